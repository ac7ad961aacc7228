"""GPT-NeoX on one device: the module, its initial weights, its sizes."""

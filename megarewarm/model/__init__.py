"""Transformers of each family on one device: the module, its initial weights, its sizes."""

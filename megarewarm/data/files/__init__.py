"""Token files: their bytes, indexes, manifests and identity."""

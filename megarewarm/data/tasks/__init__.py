"""Tasks: items whose right continuation a model is to find."""

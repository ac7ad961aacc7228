"""Checkpoints: the native format, their history, and one file per foreign format."""

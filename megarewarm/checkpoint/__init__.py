"""Checkpoints: our own sharded ones, their history, and one file per foreign format."""

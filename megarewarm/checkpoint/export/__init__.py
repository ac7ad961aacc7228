"""Checkpoints written for others and for ourselves, one tensor in memory at a time."""

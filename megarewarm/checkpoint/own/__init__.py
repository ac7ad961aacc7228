"""Checkpoints of our own: counters, tensors, checksums, saving in the background, and which stay."""

"""Writers of checkpoints, one tensor in memory at a time."""

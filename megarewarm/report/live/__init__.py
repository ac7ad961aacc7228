"""A live view of runs in progress."""

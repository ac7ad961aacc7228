"""What a run writes and shows: its folder, metrics, progress."""

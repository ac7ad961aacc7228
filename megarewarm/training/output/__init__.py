"""Output of a run: its folder, metrics, console lines."""

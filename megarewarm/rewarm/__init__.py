"""Re-warming: what a run keeps of a loaded checkpoint and what it resets, and how much of the old data it replays."""

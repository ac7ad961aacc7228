"""Run folders and experiment folders as files: what is in them, and how they are read."""

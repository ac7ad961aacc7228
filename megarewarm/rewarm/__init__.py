"""The heart: what a loaded checkpoint keeps and loses, and how much of the old data is replayed."""

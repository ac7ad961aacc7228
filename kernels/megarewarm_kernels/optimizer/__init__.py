"""AdamW's update in one pass."""

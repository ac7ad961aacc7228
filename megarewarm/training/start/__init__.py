"""What is settled before a run is built: its plan, its inputs, what they cost."""

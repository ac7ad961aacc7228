"""Before a run is built: its plan, its inputs, their cost."""

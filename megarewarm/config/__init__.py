"""The one schema of a run, and the reading of YAML files into it."""

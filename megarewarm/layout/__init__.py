"""Estimates for layouts of ranks before anything runs: memory, traffic and time."""

"""Carrying experiments out: which runs are done, what the others cost, starting them here or under Slurm."""

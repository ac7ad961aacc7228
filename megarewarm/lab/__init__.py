"""Running experiments: which runs are done, what the others cost, and starting them on this machine or with Slurm."""

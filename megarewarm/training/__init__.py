"""Training: the plan of a run, the loop, evaluation, metrics."""

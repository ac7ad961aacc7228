"""What follows each step: checks, times, dynamics, evaluation, saves, stops."""

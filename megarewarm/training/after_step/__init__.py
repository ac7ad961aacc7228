"""What follows each step: judgement, times, dynamics, evaluation, saves, stops."""

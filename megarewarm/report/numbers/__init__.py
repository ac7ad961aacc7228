"""What runs and arms amount to, in numbers."""

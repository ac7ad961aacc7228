"""Runs and arms in numbers."""

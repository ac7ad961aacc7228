"""Runs that are under way, as a live view."""

"""Layouts of ranks by arithmetic: memory, traffic and time, before anything runs."""

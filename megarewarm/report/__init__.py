"""Reads the metrics of runs and presents them as figures and sentences. Imports nothing from training."""

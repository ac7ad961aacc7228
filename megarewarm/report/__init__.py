"""Reads the metrics of runs, draws them and puts them into words. Imports nothing of training."""

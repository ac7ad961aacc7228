"""Samples of many sources, blended into batches."""

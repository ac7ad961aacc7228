"""Samples of one token file, in an order that is computed."""

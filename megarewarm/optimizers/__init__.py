"""Optimizers: each over the parameters of a ``ParallelModel``, with a state that can be named, saved, kept and reset."""

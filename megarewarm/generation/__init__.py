"""Text out of a model: cached keys and values, sampling, continuations of prompts, documents."""

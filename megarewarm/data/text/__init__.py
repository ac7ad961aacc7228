"""From text to token files: tokenizers, documents, preprocessing."""

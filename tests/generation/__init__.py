"""Text out of a model, against transformers and exact frequencies."""

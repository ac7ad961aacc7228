"""Published laws of continual pre-training, fitted to the user's own short runs."""

"""Published laws of continual pre-training, fitted to one's own short runs."""

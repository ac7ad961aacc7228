"""megarewarm: continual pre-training of GPT-NeoX models, with re-warming as a first-class thing."""

__version__ = "0.1.0"

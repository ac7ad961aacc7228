"""Token files, their order, their blend, and how they are made from text."""

"""Ranks: how a launcher starts them, how they meet, what they add up."""

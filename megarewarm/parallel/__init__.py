"""Ranks: launchers, rendezvous, collectives, layouts."""

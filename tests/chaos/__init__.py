"""Faults of every kind, in every phase, against real processes under load."""

"""Sums of squares as integers: `reference.py` is the truth."""

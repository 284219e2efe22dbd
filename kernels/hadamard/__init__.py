"""Groups of neighbours times the Hadamard matrix: `reference.py` is the truth."""

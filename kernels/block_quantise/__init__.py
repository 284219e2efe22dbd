"""Values as small codes and one scale a block: `reference.py` is the truth."""

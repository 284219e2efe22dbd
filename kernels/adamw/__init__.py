"""AdamW and Adam of whole leaves in one pass: `reference.py` is the truth."""

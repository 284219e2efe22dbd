"""CRC-32C of memory, and of a part of a file while it is read: `reference.py` is the truth."""

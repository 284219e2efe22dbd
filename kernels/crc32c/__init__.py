"""CRC-32C of memory, and of a part of a file while it is read or written: `reference.py` is the truth."""

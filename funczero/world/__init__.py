"""Processes: how they find each other, which of them live, what each of them launched, and how they end.

May import `core`.
"""

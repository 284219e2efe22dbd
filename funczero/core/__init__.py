"""Values only: the central types, trees, the order of sums, keys, policies, numbers.

Imports nothing of funczero.
"""

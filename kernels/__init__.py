"""Kernels, one folder each: `reference.py` in torch is the truth, beside it the fast paths.

They are packaged as `funczero.kernels`.
"""

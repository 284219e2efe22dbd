"""Kernels, one folder each: `reference.py` in torch is the truth, beside it the fast paths; packaged as `funczero.kernels`."""

"""Kernels, one folder each: `reference.py` in torch is the truth; `cpu.py` with a file of C++, and `gpu.py` in Triton,
are its fast forms; `trial.py` has the cases on which a form must show the reference's bits before it is used.
`registry.kernel` chooses.

They are packaged as `funczero.kernels`.
"""

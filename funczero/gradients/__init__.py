"""Where gradients come from: a loss function or a module, run over leaves that are gathered unit by unit.

May import what stands left of it, up to `transforms` and `optim`.
"""

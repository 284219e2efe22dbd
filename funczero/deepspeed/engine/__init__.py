"""DeepSpeed's engine over a streamed chain: how a forward reads parameters, the open window, checkpoints, loaders, and what scripts ask.

It imports the floors, `config` and `optim`.
"""

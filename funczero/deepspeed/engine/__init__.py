"""DeepSpeed's engine over a streamed chain: its loop, how a forward reads parameters, checkpoints, what scripts ask.

It imports the floors, `config` and `optim`.
"""

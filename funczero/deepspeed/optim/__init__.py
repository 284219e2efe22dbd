"""DeepSpeed's optimizers over a chain: param groups as leaves, the optimizer that `initialize` returns, a client's own classes.

It imports the floors and `config`.
"""

"""DeepSpeed's optimizers over a chain: param groups as leaves, the optimizer that `initialize` returns, client classes.

It imports the floors and `config`.
"""

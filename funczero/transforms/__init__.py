"""The algebra: each transform wraps the gradient to its left; `mean` is where sums become values.

May import what stands left of it: `core`, `world`, `layout`, `comm`.
"""

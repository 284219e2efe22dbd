"""A chain as a train step: state in, state out; what ranks compare, and what a user is told.

May import what stands left of it, up to `gradients`.
"""

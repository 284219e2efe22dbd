"""What travels: collectives over a mesh axis, their adjoints, and the norm that is exact on every world.

May import what stands left of it: `core`, `world`, `layout`.
"""

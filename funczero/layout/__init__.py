"""Who holds what: the mesh, the structure of a tree, a rank's part of it, and how it is first filled.

May import `core` and `world`.
"""

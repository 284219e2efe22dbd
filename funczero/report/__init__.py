"""`funczero report` and `funczero watch`: a run's folder as a page, and in the terminal while it grows.

Nothing of the run is imported: a folder that was copied from another machine tells as much as one that still grows.
"""

"""A ds_config.json as a value: what may be written, what was, what follows from it, and the chain that it describes.

It imports the floors and nothing else of the face.
"""

"""A ds_config.json as a value: every key that exists, what was written, what follows from it, and the chain that it describes.

It imports the floors and nothing else of the face.
"""

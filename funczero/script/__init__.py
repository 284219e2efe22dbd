"""What every script of research code repeats: its processes, its flags, its loop, and what a person sees meanwhile.
Nothing of it is imported before a script begins an experiment.
"""

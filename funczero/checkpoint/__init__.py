"""Checkpoints on orbax: from any mesh to any mesh, never half, never a pickle. Importing this loads neither JAX nor
orbax nor tensorstore.
"""

from funczero.checkpoint.checkpointer import Checkpointer as Checkpointer
from funczero.checkpoint.error import CheckpointError as CheckpointError
from funczero.checkpoint.notice import Notice as Notice
from funczero.checkpoint.reading import Restored as Restored

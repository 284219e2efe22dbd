"""Which way a store is read."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from funczero.checkpoint.arrays import Array
from funczero.checkpoint.decoded import Decoded
from funczero.checkpoint.direct import Direct
from funczero.checkpoint.parts import Reader
from funczero.kernels.registry import used


def opened(folder: Path, arrays: dict[str, Array]) -> Reader:
    """A committed store, to be asked for parts of arrays.

    Law: both ways give the same bits and refuse the same damage. Straight from the files where the checksum's kernel is
    there; through tensorstore, which takes twice the time, where it is not (FUNCZERO_KERNELS=reference), or where
    memory has another order of bytes than a store.

    Args:
      folder: of the store.
      arrays: what the manifest says of each.

    Raises:
      CheckpointError: it cannot be opened.
    """
    straight = sys.byteorder == "little" and used("crc32c", torch.device("cpu")) == "cpu"
    return (Direct if straight else Decoded)(folder, arrays)

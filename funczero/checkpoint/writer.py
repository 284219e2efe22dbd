"""One process's chunks into a store of its own, with the checksum of each; on disk when that is known."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from math import ceil, prod
from pathlib import Path

import torch

from funczero.checkpoint.arrays import Array
from funczero.checkpoint.coded import Coded
from funczero.checkpoint.ocdbt import MOST
from funczero.checkpoint.straight import Straight
from funczero.checkpoint.writing import Filled, Store
from funczero.kernels.registry import used

SYNCS = 8  # files that are brought to disk at a time, so that they share the file system's commits


def write(folder: Path, arrays: dict[str, Array], chunks: Iterable[Filled]) -> dict[str, dict[str, str]]:
    """Write pieces of arrays into a store of this process alone, and return the checksum of every chunk: name -> chunk
    -> hexadecimal.

    Law: both ways, with a checksum of our own and without, write the same keys and values.

    Args:
      folder: the process's store, which is not there yet; orbax merges those of all.
      arrays: every array to create.
      chunks: in any order.
    """
    keys = sum(1 + prod(ceil(n / c) for n, c in zip(a.shape, a.chunk, strict=True)) for a in arrays.values())
    straight = keys <= MOST and sys.byteorder == "little" and used("crc32c", torch.device("cpu")) == "cpu"
    store: Store = (Straight if straight else Coded)(folder, arrays)
    try:
        for chunk in chunks:
            store.put(chunk)
        tails = store.finish()
    except BaseException:
        store.give_up()
        raise
    _to_disk(folder)
    return tails


def _to_disk(folder: Path) -> None:
    """Return when all files of a folder, and their names, would outlast a power cut.

    Raises:
      OSError: the disk does not take them.
    """

    def sync(path: Path) -> None:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        except OSError as e:
            if not (path.is_dir() and e.errno in (errno.EINVAL, errno.ENOTSUP)):  # file systems that keep names anyway
                raise
        finally:
            os.close(file)

    with ThreadPoolExecutor(SYNCS, "funczero-sync") as pool:
        list(pool.map(sync, [*folder.rglob("*"), folder, folder.parent]))

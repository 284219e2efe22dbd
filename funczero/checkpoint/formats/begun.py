"""Leaves that a model began with and no update moves: a checkpoint of parameters does not hold them, and a folder for
Hugging Face must, or the model would begin anew with those of its class.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from absl import logging
from torch import Tensor

from funczero.checkpoint.formats import sources
from funczero.checkpoint.formats.entry import Entry
from funczero.checkpoint.formats.naming import Taken
from funczero.checkpoint.names import listed, state_dict_key

WEIGHTS = "*.safetensors", "pytorch_model*.bin"


def begun(config: Path, entries: list[Entry], tied: Collection[str], exclude: str | None) -> dict[Entry, Tensor]:
    """What the folder of the model that a run began as has, and the checkpoint does not; read at once, for what is
    written may replace it, and said in print.

    A folder may name leaves otherwise than the module. So of those that are not known by their key only these count:
    the ones of a module that other leaves are known of, and the ones whose last name no leaf has (running_mean).

    Args:
      config: the folder, or a config.json, beside which nothing is looked for.
      entries: of the checkpoint.
      tied: other names of entries, which have their values from there.
      exclude: a regex of keys that are left out.

    Raises:
      CheckpointError: the folder's weights cannot be read.
    """
    if not config.is_dir() or not any(any(config.glob(pattern)) for pattern in WEIGHTS):
        return {}
    known = {e.key for e in entries} | {*tied}
    modules, lasts = {k.rpartition(".")[0] for k in known}, {k.rpartition(".")[2] for k in known}
    out = {}
    for name, leaf in sources.read(config, Taken(False)).leaves.items():
        key = state_dict_key(name)
        above, _, last = key.rpartition(".")
        left_out = exclude is not None and re.search(exclude, key)
        if key not in known and not left_out and (above in modules or last not in lasts):
            out[Entry(key, f"{config.name}:{key}", leaf.dtype, leaf.shape)] = leaf.read()
    if out:
        keys = listed([e.key for e in out])
        logging.warning("export: %s: the checkpoint does not hold them, and they are those of %s", keys, str(config))
    return out

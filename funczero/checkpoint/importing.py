"""Others' weights into a checkpoint of parameters, and of moments where the source has them by leaf."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from absl import logging

from funczero.checkpoint import folder
from funczero.checkpoint.checkpointer import Checkpointer
from funczero.checkpoint.formats.leaf import Found, Leaf, chosen
from funczero.checkpoint.formats.naming import Taken
from funczero.checkpoint.formats.sources import read
from funczero.checkpoint.memory import floating
from funczero.checkpoint.names import Names, Part, whole


def import_weights(
    source: str | Path,
    directory: str | Path,
    name: str = "0",
    zeros: bool = False,
    *,
    dtype: str | None = None,
    exclude: str | None = None,
    buffers: str | None = None,
    moments: bool = True,
    optimizer: str | None = None,
) -> str:
    """A checkpoint of what somebody else saved; its name. Leaves are read and written one after the other, and those
    that lie at one place of a file piece by piece.

    It is restored as any other, with `only="^params/"` for the parameters alone. What the source does not hold begins
    fresh, rates come from the script. Nothing that is read is run.

    Args:
      source: safetensors (a file, an index, a folder), a file of torch.save, a folder of torch.distributed.checkpoint,
        one that DeepSpeed saved at ZeRO stages 1 to 3, or a tree of stock orbax.
      zeros: take chunks that an orbax tree lacks for zeros, which older versions of orbax did not write; otherwise they
        are an error.
      dtype: of floating parameters; None: as they are.
      exclude: a regex; leaves whose names it is found in are left out, with their moments.
      buffers: a regex of leaves that are no parameters but the model's own state. DeepSpeed says which they are, and
        what is not floating is never a parameter.
      moments: also the optimizer's state, where the source has it by leaf.
      optimizer: the transform that it is for; by default the one that keeps just these moments, as "adamw".

    Raises:
      CheckpointError: it cannot be read, is not whole, or holds what is not read; it names the file and the leaf;
        `dtype` is no floating dtype, or ends before a value.
      ValueError: a regex is none.
    """
    if buffers is not None:
        try:
            re.compile(buffers)
        except re.error as e:
            raise ValueError(f"import: buffers={buffers!r} is no regex ({e})") from None
    text = folder.check_name(name)
    found = read(Path(source), Taken(moments, optimizer, buffers), zeros)
    found = chosen(found, exclude, None if dtype is None else floating(dtype))
    for note in found.notes:
        logging.warning("import: %s", note)
    parts = {n: _part(x) for n, x in found.leaves.items()} | _counters(found)
    reads = {n: x.read for n, x in found.leaves.items()}
    rows = {n: x.rows for n, x in found.leaves.items() if x.at is not None and x.shape}  # from their place in a file
    with Checkpointer(directory) as ck:
        names = Names(parts, found.ties)
        ck.save_named(names, text, reads, rows=rows, step=found.step, updates=found.updates, client_state=found.client)
    return name


def _part(x: Leaf) -> Part:
    return Part(torch.empty(x.shape, dtype=x.dtype, device="meta"), x.shape, (0,) * len(x.shape))


def _counters(found: Found) -> dict[str, Part]:
    """The counts of a run, where the source has them, and each optimizer's own."""
    if not found.step and not found.updates:
        return {}
    fields = {"mu", "nu", "trace"}
    heads = {n.split("/")[0] for n in found.leaves if len(n.split("/")) > 2 and n.split("/")[1] in fields}
    counts = {f"{head}/count": whole(torch.tensor(float(found.updates))) for head in sorted(heads)}
    return {
        "step": whole(torch.tensor(found.step)), "updates": whole(torch.tensor(found.updates)), **counts
    }  # fmt: skip

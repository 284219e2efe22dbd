"""What a save is made of before anything is written: a rank's leaves by name, and what the checkpoint will say of
itself; or the error to tell all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from funczero.checkpoint import client, commit, folder, manifest
from funczero.checkpoint.manifest import Manifest
from funczero.checkpoint.names import Names, named, refuse_collisions, whole
from funczero.checkpoint.peers import Peers
from funczero.checkpoint.restore import window
from funczero.checkpoint.saving import refuse_taken
from funczero.core import tree
from funczero.core.types import TrainState
from funczero.layout.slots import Slots


class Asked(NamedTuple):
    """The arguments of a save."""

    state: TrainState
    name: Any
    client_state: Any
    metrics: Mapping[str, float] | None
    overwrite: bool


def prepared(asked: Asked, directory: Path, peers: Peers, step: Any, config: Any) -> tuple[Names, Manifest]:
    """The leaves, and the manifest without its arrays.

    Raises:
      ValueError, TypeError, FileExistsError: it cannot be saved.
    """
    text, state = folder.check_name(asked.name), asked.state
    if not isinstance(state, TrainState) or int(state.step) < 0:
        raise ValueError("save: it takes a TrainState that was not donated; give the state that step(...) returned")
    cut = {a: n for a, (n, _) in coords_of(state).items() if n > peers.size}
    if cut:
        raise ValueError(
            f"save: the state is cut over {cut}, but this process is in a world of {peers.size}; save it in the world"
            " that made it"
        )
    found = named(state, peers.rank, peers.size)
    encoded, arrays = client.encode(asked.client_state)
    for key in arrays:
        if key in found.parts:
            raise ValueError(f"save: {key!r} is both in the state and in the client state; rename a transform")
    found = found._replace(parts=found.parts | {key: whole(x)._replace(first=True) for key, x in arrays.items()})
    refuse_collisions(list(found.parts))
    about = {"config": config} | ({} if step is None else {"chain": chain_of(step), "specs": _specs(found)})
    numbers = {str(k): _number(str(k), v) for k, v in (asked.metrics or {}).items()}
    told = Manifest(
        text,
        0,
        int(state.step),
        int(state.updates),
        {},
        found.ties,
        numbers,
        encoded,
        peers.size,
        window(state),
        about,
        manifest.versions(),
    )
    if peers.rank == 0:
        refuse_taken(directory, text, asked.overwrite)
        commit.orbax()
    return found, told


def coords_of(state: TrainState) -> dict[str, tuple[int, int]]:
    """This rank's place on every axis that the state names."""
    slots = [x for x in tree.leaves(state, is_leaf=lambda x: isinstance(x, Slots)) if isinstance(x, Slots)]
    return {axis: (size, index) for x in slots for axis, size, index in x.where.coords}


def chain_of(step: Any) -> str:
    """A step's chain as it is printed, on which mesh; whether it donates is no matter."""
    return str(step).replace(", donated", "", 1)


def _specs(found: Names) -> dict[str, str]:
    return {n: repr(p.where.spec(p.leaf)) for n, p in found.parts.items() if p.where is not None}


def _number(name: str, x: Any) -> float:
    try:
        return float(x)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(
            f"save: the metric {name!r} is {str(x)[:40] if not isinstance(x, int) else 'an integer beyond float64'}"
            f" ({type(x).__name__}); give a number"
        ) from None

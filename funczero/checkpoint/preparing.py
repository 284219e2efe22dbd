"""What a save is made of before anything is written: a rank's leaves by name, and what the checkpoint will say of
itself; or the error to tell all ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from funczero.checkpoint import client, commit, folder, manifest, window
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.manifest import Manifest
from funczero.checkpoint.names import Names, named, refuse_collisions, whole
from funczero.checkpoint.peers import Peers
from funczero.checkpoint.saving import KINDS, Passing, refuse_taken, spoken
from funczero.core import tree
from funczero.core.types import TrainState
from funczero.layout.slots import Slots
from funczero.step.describe import describe


class Asked(NamedTuple):
    """The arguments of a save."""

    state: TrainState
    name: Any
    client_state: Any
    metrics: Mapping[str, float] | None
    overwrite: bool
    passing: Passing
    without: frozenset[str] = frozenset()  # leaves that are left out


def agreed(
    asked: Asked, directory: Path, peers: Peers, number: int, step: Any, config: Any, join: float
) -> tuple[Names, Manifest, list[Any]]:
    """This rank's leaves, the manifest without its arrays, and everybody's coordinates, once all ranks are here and
    well.

    Args:
      number: of the call, the same on all ranks.
      join: seconds in which all ranks must come.

    Raises:
      ValueError, TypeError, FileExistsError: on all ranks, where one of them cannot save.
      CheckpointError: a rank does not come.
    """
    ready, error = None, None
    peers.enter(number, "save")
    try:
        asked.passing("asked")
        ready = prepared(asked, directory, peers, step, config)
    except Exception as e:
        error = e
    coords = coords_of(asked.state) if ready else {}
    left = zlib.crc32("\n".join(sorted(asked.without)).encode())
    peers.put(f"{number}/ready/{peers.rank}", {"coords": coords, "error": spoken(error), "without": left})
    go = _go(peers, number, ready[1].name if ready else "", error, join)
    assert ready is not None
    found, told = ready
    if go["name"] != told.name:
        logging.warning(
            "save: rank %d named this checkpoint %r, rank 0 %r; rank 0's name counts", peers.rank, told.name, go["name"]
        )
    return found, told._replace(name=go["name"]), go["coords"]


def _go(peers: Peers, number: int, name: str, error: BaseException | None, join: float) -> dict[str, Any]:
    """Rank 0's name and everybody's coordinates; or one error for all."""
    if peers.rank == 0:
        try:
            all_ready = peers.wait([(r, f"{number}/ready/{r}") for r in range(peers.size)], "save", join=join)
            bad = next(((r, a["error"]) for r, a in enumerate(all_ready) if a["error"]), None)
            odd = next((r for r, a in enumerate(all_ready) if a["without"] != all_ready[0]["without"]), None)
            if bad is None and odd is not None:
                text = f"save: rank {odd} leaves out other leaves than rank 0; give without= alike on all ranks"
                bad = (0, ("ValueError", text))
            go = {"name": name, "coords": [a["coords"] for a in all_ready], "error": bad}
        except CheckpointError as e:
            go = {"error": (0, spoken(e))}
        if peers.first(f"{number}/decided"):
            peers.put(f"{number}/go", go)
    heard = lambda: peers.wait([(0, f"{number}/go")], "save", join=join + 10)
    try:
        (go,) = heard()
    except CheckpointError as e:
        if _withdrawn(peers, number, e):
            raise
        (go,) = heard()  # it was being given
    if "withdrawn" not in go:
        peers.forget(number)  # all are here
    if go["error"]:
        rank, (kind, text) = go["error"]
        if error is not None:
            raise error
        raise KINDS.get(kind, CheckpointError)(
            text if peers.rank == rank or kind == "CheckpointError" else f"{text} (rank {rank})"
        )
    return go


def _withdrawn(peers: Peers, number: int, error: CheckpointError) -> bool:
    """This rank waits no longer for rank 0, which hears that in place of its own word should it come; False where the
    word is given already.
    """
    try:
        if not peers.first(f"{number}/decided"):
            return False
        peers.put(f"{number}/go", {"error": (peers.rank, spoken(error)), "withdrawn": True})
    except CheckpointError:  # the store is gone: there is nobody to tell
        pass
    return True


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
    found = _left(named(state, peers.rank, peers.size), asked.without)
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
        window.described(state),
        about,
        manifest.versions(),
    )
    if peers.rank == 0:
        refuse_taken(directory, text, asked.overwrite)
        commit.orbax()
    return found, told


def _left(found: Names, without: frozenset[str]) -> Names:
    """What is saved of a state: not the leaves of these names, whichever of its names a tied leaf is given by."""
    gone = {found.ties.get(n, n) for n in without}
    odd = next((n for n in sorted(gone) if n not in found.parts or not n.startswith("params/")), None)
    if odd is not None:
        raise ValueError(f"save: without= names {odd!r}, which is no parameter; it takes names as 'params/<path>'")
    parts = {n: p for n, p in found.parts.items() if n not in gone}
    return Names(parts, {n: first for n, first in found.ties.items() if first not in gone})


def coords_of(state: TrainState) -> dict[str, tuple[int, int]]:
    """This rank's place on every axis that the state names."""
    slots = [x for x in tree.leaves(state, is_leaf=lambda x: isinstance(x, Slots)) if isinstance(x, Slots)]
    return {axis: (size, index) for x in slots for axis, size, index in (*x.where.coords, *x.where.terms)}


def chain_of(step: Any) -> str:
    """A step's chain as it is printed, on which mesh; whether it donates is no matter."""
    return describe(step.grad, step.source).replace(", donated", "", 1)


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

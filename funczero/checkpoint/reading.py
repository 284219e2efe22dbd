"""A restore on all ranks together: which checkpoint, and that all of them have read it, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from funczero.checkpoint import folder, manifest
from funczero.checkpoint.arrays import CheckpointError
from funczero.checkpoint.folder import Keep
from funczero.checkpoint.names import listed
from funczero.checkpoint.peers import Peers
from funczero.checkpoint.restore import Context, Want, fill, load_client
from funczero.checkpoint.saving import KINDS, sentence, spoken
from funczero.core.types import TrainState


class Restored(NamedTuple):
    """What was read."""

    state: TrainState
    client_state: Any
    name: str
    step: int  # calls that closed an update
    metrics: dict[str, float]
    notes: tuple[str, ...]  # what was not taken as it is


class Reading(NamedTuple):
    """One restore, as this rank sees it."""

    peers: Peers
    number: int  # of the call
    directory: Path
    limit: int  # bytes of a manifest
    want: Want
    context: Context


def choices(
    peers: Peers,
    number: int,
    directory: Path,
    name: int | str | float,
    keep: Keep,
    fallback: bool,
    limit: int,
    join: float,
) -> list[str]:
    """The folders to try, the same on all ranks; rank 0 looks."""
    if peers.rank == 0:
        try:
            answer: Any = [str(e.path) for e in folder.choose(directory, name, keep, fallback, limit)]
        except Exception as e:
            answer = {"error": spoken(e)}
        peers.put(f"{number}/choice", answer)
    (answer,) = peers.wait([(0, f"{number}/choice")], "restore", join=join)
    if isinstance(answer, dict):
        kind, text = answer["error"]
        raise KINDS.get(kind, CheckpointError)(text)
    return answer


def first_good(
    reading: Reading, paths: list[str], like: TrainState, fresh: Callable[[], TrainState], fallback: bool
) -> Restored:
    """The first of these checkpoints that every rank can read.

    Raises:
      CheckpointError: none; what is wrong with each. On all ranks.
    """
    rank, problems = reading.peers.rank, []
    for attempt, path in enumerate(paths):
        result, problem = _tried(reading, Path(path), like, fresh, f"{reading.number}/read/{attempt}")
        if result is not None:
            for note in result.notes if rank == 0 else ():
                logging.warning("restore %s: %s", result.name, note)
            return result
        problems.append(problem)
        if fallback and rank == 0:
            logging.warning("%s; passed over", problem)
    raise CheckpointError("; ".join(problems))


def _tried(
    reading: Reading, path: Path, like: TrainState, fresh: Callable[[], TrainState], key: str
) -> tuple[Restored | None, str]:
    """One checkpoint on all ranks: all have read it, or none has."""
    mine, done, peers = "", None, reading.peers
    try:
        found = manifest.load(path, reading.limit)
        if peers.rank == 0 and (broken := manifest.check_files(path, found)):
            raise CheckpointError(
                f"checkpoint {str(path)!r}:"
                f" {'; '.join(broken[:3])}{f'; and {len(broken) - 3} more' * (len(broken) > 3)}"
            )
        state, notes = fill(path, found, like, fresh, reading.want, reading.context)
        odd = found.about.get("not finite")
        notes += [f"of its leaves {listed(odd)} held NaN or infinity when they were saved"] if odd else []
        done = Restored(
            state, load_client(path, found), path.name.removesuffix(folder.NEW), found.step, found.metrics, tuple(notes)
        )
    except Exception as e:
        mine = (
            sentence(e)
            if isinstance(e, (CheckpointError, ValueError, TypeError, OSError))
            else f"{type(e).__name__}: {sentence(e)}"
        )
        mine = mine if str(path) in mine else f"{mine} (in {str(path)!r})"
    peers.put(f"{key}/{peers.rank}", mine)
    all_told = peers.wait([(r, f"{key}/{r}") for r in range(peers.size)], "restore")
    bad = next(((r, text) for r, text in enumerate(all_told) if text), None)
    if bad is None:
        return done, ""
    return None, bad[1] + f" (rank {bad[0]})" * (peers.size > 1)

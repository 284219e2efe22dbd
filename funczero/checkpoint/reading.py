"""A restore on all ranks together: which checkpoint, and that all of them have read it, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from funczero.checkpoint import folder, manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.folder import Keep
from funczero.checkpoint.names import listed
from funczero.checkpoint.peers import Peers
from funczero.checkpoint.preparing import chain_of, coords_of
from funczero.checkpoint.restore import fill, load_client
from funczero.checkpoint.saving import KINDS, Passing, sentence, spoken
from funczero.checkpoint.target import Restorer, Want, template
from funczero.core.types import TrainState
from funczero.step.fits import taken_back


class Restored(NamedTuple):
    """What was read."""

    state: TrainState
    client_state: Any
    name: str
    step: int  # calls that closed an update
    metrics: dict[str, float]
    notes: tuple[str, ...]  # what was not taken as it is


class Reading(NamedTuple):
    """One restore, as this rank calls it."""

    peers: Peers
    number: int  # of the call
    directory: Path
    keep: Keep
    limit: int  # bytes of a manifest
    join: float  # seconds in which all ranks must come
    want: Want
    passing: Passing


def restored(reading: Reading, name: int | str | float, like: Any, step: Any, fallback: bool, donate: bool) -> Restored:
    """A state from the checkpoint that a name means, once all ranks are here and well.

    Args:
      like: a state, or (step, params).
      step: whose chain and device count; None where `like` alone says where a leaf lies.
      fallback: pass over damaged checkpoints.
      donate: fill the memory of `like`.

    Raises:
      CheckpointError: none can be read, or a rank does not come. On all ranks.
    """
    peers, number, error = reading.peers, reading.number, None
    peers.enter(number, "restore")
    try:
        target, fresh = (like, lambda: like) if isinstance(like, TrainState) else template(*like)
    except Exception as e:
        error = e
    peers.put(f"{number}/ready/{peers.rank}", {"coords": {} if error else coords_of(target), "error": spoken(error)})
    paths = _choices(reading, name, fallback, error) if error is None or peers.rank == 0 else []
    ready = peers.wait([(r, f"{number}/ready/{r}") for r in range(peers.size)], "restore", join=reading.join)
    if error is not None:
        raise error
    if (bad := next(((r, a["error"]) for r, a in enumerate(ready) if a["error"]), None)) is not None:
        raise KINDS.get(bad[1][0], CheckpointError)(f"{bad[1][1]} (rank {bad[0]})")
    peers.forget(number)  # all are here
    coords = [{a: tuple(c) for a, c in r["coords"].items()} for r in ready]
    device = target.params.buffers[0].device if step is None else step.live_mesh.device
    restorer = Restorer(peers.rank, peers.size, coords, None if step is None else chain_of(step), device, donate)
    return _first_good(reading, restorer, paths, target, fresh, fallback)


def _choices(reading: Reading, name: int | str | float, fallback: bool, error: Exception | None) -> list[str]:
    """The folders to try, the same on all ranks; rank 0 looks, or says that it cannot go on."""
    peers, key = reading.peers, f"{reading.number}/choice"
    if peers.rank == 0:
        try:
            if error is not None:
                raise error
            chosen = folder.choose(reading.directory, name, reading.keep, fallback, reading.limit)
            answer: Any = [str(e.path) for e in chosen]
        except Exception as e:
            answer = {"error": spoken(e)}
        peers.put(key, answer)
    (answer,) = peers.wait([(0, key)], "restore", join=reading.join)
    if error is not None:
        return []
    if isinstance(answer, dict):
        kind, text = answer["error"]
        raise KINDS.get(kind, CheckpointError)(text)
    return answer


def _first_good(
    reading: Reading,
    restorer: Restorer,
    paths: list[str],
    like: TrainState,
    fresh: Callable[[], TrainState],
    fallback: bool,
) -> Restored:
    """The first of these checkpoints that every rank can read.

    Raises:
      CheckpointError: none; what is wrong with each. On all ranks.
    """
    rank, problems = reading.peers.rank, []
    for attempt, path in enumerate(paths):
        result, problem = _tried(reading, restorer, Path(path), like, fresh, f"{reading.number}/read/{attempt}")
        if result is not None:
            for note in result.notes if rank == 0 else ():
                logging.warning("restore %s: %s", result.name, note)
            return result
        problems.append(problem)
        if fallback and rank == 0:
            logging.warning("%s; passed over", problem)
    raise CheckpointError("; ".join(problems))


def _tried(
    reading: Reading, restorer: Restorer, path: Path, like: TrainState, fresh: Callable[[], TrainState], key: str
) -> tuple[Restored | None, str]:
    """One checkpoint on all ranks: all have read it, or none has."""
    mine, done, peers = "", None, reading.peers
    try:
        done = read(path, reading.limit, like, fresh, reading.want, restorer)
    except CheckpointError as e:
        mine = str(e)
    except BaseException as e:  # it leaves, alive as it is: nobody would wait for its word in vain
        peers.put(f"{key}/{peers.rank}", f"checkpoint {str(path)!r}: left by {type(e).__name__} while it was read")
        raise
    peers.put(f"{key}/{peers.rank}", mine)
    reading.passing("awaits")
    all_told = peers.wait([(r, f"{key}/{r}") for r in range(peers.size)], "restore")
    bad = next(((r, text) for r, text in enumerate(all_told) if text), None)
    if bad is None:
        if done is not None and restorer.donated:
            taken_back(done.state)
        return done, ""
    return None, bad[1] + f" (rank {bad[0]})" * (peers.size > 1)


def read(
    path: Path, limit: int, like: TrainState, fresh: Callable[[], TrainState], want: Want, restorer: Restorer
) -> Restored:
    """One checkpoint on one rank, its ranges alone; rank 0 looks first whether all files are there and as long as they
    were, and at what is in those that hold no chunks.

    Args:
      like: what is to be filled; `fresh` makes it.

    Raises:
      CheckpointError: it cannot be read, whatever is wrong with it.
    """
    try:
        found = manifest.load(path, limit)
        if restorer.rank == 0 and (broken := manifest.check_files(path, found, quick=True)):
            more = f"; and {len(broken) - 3} more" * (len(broken) > 3)
            raise CheckpointError(f"checkpoint {str(path)!r}: {'; '.join(broken[:3])}{more}")
        state, notes = fill(path, found, like, fresh, want, restorer)
        odd = found.about.get("not finite")
        notes += [f"of its leaves {listed(odd)} held NaN or infinity when they were saved"] if odd else []
        name = path.name.removesuffix(folder.NEW)
        return Restored(state, load_client(path, found), name, found.step, found.metrics, tuple(notes))
    except Exception as e:
        known = isinstance(e, (CheckpointError, ValueError, TypeError, OSError))
        text = sentence(e) if known else f"{type(e).__name__}: {sentence(e)}"
        raise CheckpointError(text if str(path) in text else f"{text} (in {str(path)!r})") from e

"""Saves beside the training, and restores, on all ranks together."""
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from absl import logging

from funczero import tree
from funczero.checkpoint import client, folder, manifest
from funczero.checkpoint.arrays import CheckpointError
from funczero.checkpoint.folder import Keep
from funczero.checkpoint.layout import deal
from funczero.checkpoint.manifest import Manifest
from funczero.checkpoint.names import Names, named, whole
from funczero.checkpoint.peers import Peers
from funczero.checkpoint.restore import Context, Want, fill, load_client, template, window
from funczero.checkpoint.saving import KINDS, Job, Staging, arrays_of, refuse_taken, run, sentence, spoken
from funczero.spec import Slots
from funczero.types import TrainState


class Restored(NamedTuple):
    """What was read."""

    state: TrainState
    client_state: Any
    name: str
    step: int  # calls that closed an update
    metrics: dict[str, float]
    notes: tuple[str, ...]  # what was not taken as it is


class _Saving(NamedTuple):
    """A save under way."""

    number: int
    name: str
    thread: threading.Thread
    failed: list[BaseException]  # what this rank's thread raised


class Checkpointer:
    """Checkpoints of a run in a folder that all ranks share: orbax's format, any world reads what any world wrote.

    Law: `restore(like=...)` of what was saved gives the same bits in every leaf, on any mesh and at any stage; a checkpoint is there whole or not at all.
    Every method is called by all ranks, at the same place of the loop; failures are raised on all of them.

    >>> import tempfile, torch, funczero as fz
    >>> step = fz.train_step(fz.value_and_grad(lambda p, b: ((p["w"] * b).sum(), b.sum())), fz.adamw(0.1))
    >>> state, _ = step(step.init({"w": torch.ones(3)}), torch.ones(2, 3))
    >>> with tempfile.TemporaryDirectory() as directory, Checkpointer(directory, keep=2) as ck:
    ...     ck.save(state, 1, client_state={"note": (1, 2)})
    ...     _ = ck.wait()
    ...     restored = ck.restore(like=(step, {"w": torch.empty(3, device="meta")}))
    >>> restored.client_state, bool((step.params(restored.state)["w"] == step.params(state)["w"]).all())
    ({'note': (1, 2)}, True)
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int | None = None,
        keep_period: int | None = None,
        best: tuple[str, str] | None = None,
        *,
        step: Any = None,
        config: Any = None,
        join: float = 60.0,
        max_metadata: int = manifest.LIMIT,
    ) -> None:
        """Nothing is written yet.

        Args:
          directory: shared by all ranks; made at the first save.
          keep: how many of the latest stay; None: all.
          keep_period: of those at every such step, all stay.
          best: (metric, "min" or "max"): the best by `metrics` stays, too, and is found as "best".
          step: the Step, to write its chain and specs beside the arrays, and to continue an open window of a streamed accumulate.
          config: anything of JSON to write beside the arrays, such as the resolved flags.
          join: seconds in which all ranks must come to a save or restore.
          max_metadata: bytes of a manifest that are read.
        """
        if keep is not None and keep < 1 or keep_period is not None and keep_period < 1:
            raise ValueError(f"Checkpointer: keep={keep} and keep_period={keep_period} count checkpoints and steps; write numbers of at least 1, or None")
        if best is not None and (len(best) != 2 or best[1] not in ("min", "max")):
            raise ValueError(f"Checkpointer: best={best!r} is not a metric and 'min' or 'max'; write best=('eval/loss', 'min')")
        self.directory, self.keep, self.join, self.max_metadata = Path(directory), Keep(keep, keep_period, best), join, max_metadata
        self._step, self._config = step, client.encode(config, "config")[0]
        self._peers: Peers | None = None
        self._number = self._polls = 0
        self._saving: _Saving | None = None
        self._staging = Staging()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()

    def close(self) -> None:
        """Wait for the save under way."""
        self.wait()

    @property
    def peers(self) -> Peers:
        """The ranks, once the world is there."""
        if self._peers is None:
            self._peers = Peers()
        return self._peers

    def save(self, state: TrainState, name: int | str | float, *, client_state: Any = None, metrics: Mapping[str, float] | None = None, overwrite: bool = False) -> None:
        """Copy this rank's part and return; it is written beside the training, and committed by one rename.

        The step waits for one copy of what this rank writes, and for an earlier save that is not finished. The state may be donated right after.

        Args:
          name: an int or a printable tag; where ranks name different ones, rank 0's counts.
          client_state: rank 0's, kept beside the arrays: plain values, tensors, numpy arrays; tuples, int keys and NaN come back as they are.
          metrics: numbers, for `best`.
          overwrite: replace a checkpoint of this name; otherwise that is an error.

        Raises:
          ValueError, TypeError, FileExistsError: on all ranks, before anything is written.
          CheckpointError: an earlier save failed, or a rank does not come.
        """
        self.wait()
        self._number += 1
        number, peers = self._number, self.peers
        with peers.beating():
            mine, error = self._prepared(state, name, client_state if peers.rank == 0 else None, metrics, overwrite)
            peers.put(f"{number}/ready/{peers.rank}", {"coords": _coords(state) if error is None else {}, "error": spoken(error)})
            go = self._agreed(number, mine[0] if mine else "", error)
            assert mine is not None
            text, found, told = mine
            if go["name"] != text:
                logging.warning("save: rank %d named this checkpoint %r, rank 0 %r; rank 0's name counts", peers.rank, text, go["name"])
            own = self._staging.dealt(found, go["coords"], peers.rank)
            values = self._staging.copied(found, own, peers.rank)
        told = told._replace(name=go["name"])
        self._start(Job(number, self.directory, self.keep, self.max_metadata, overwrite, told, arrays_of(found, own), own, values))

    def save_named(self, found: Names, name: str) -> None:
        """Save leaves by their names as one process, without a state and without a copy: the tensors stay untouched until `wait`."""
        self.wait()
        self._number += 1
        refuse_taken(self.directory, name, overwrite=False)
        told = Manifest(name, 0, 0, 0, {}, found.ties, {}, None, 1, {}, {"config": self._config}, manifest.versions())
        own = deal(found.parts, [{}], 0)
        values = [(p, found.parts[p.name].value.detach().contiguous()[p.box.slices()]) for p in own.pieces]
        self._start(Job(self._number, self.directory, self.keep, self.max_metadata, False, told, arrays_of(found, own), own, values))

    def _start(self, job: Job) -> None:
        failed: list[BaseException] = []
        thread = threading.Thread(target=run, args=(job, self.peers, failed), name=f"funczero-save-{job.told.name}")  # no daemon: a process that ends waits for it
        self._saving = _Saving(job.number, job.told.name, thread, failed)
        thread.start()

    def poll(self) -> str | None:
        """At a step boundary: has the save under way ended? Its name if it is committed now; all ranks are told at the same boundary.

        Raises:
          CheckpointError: it failed.
        """
        self._polls += 1
        if self._saving is None:
            return None
        peers, number = self.peers, self._saving.number
        if peers.size == 1:
            return self._ended() if not self._saving.thread.is_alive() else None
        key = f"{number}/told"
        if peers.there(key):
            return self._ended() if peers.get(key) <= self._polls else None
        if peers.rank == 0 and not self._saving.thread.is_alive():
            peers.put(key, self._polls + 1)  # seen by all at the next boundary: no rank gets there before rank 0 has left this one
        elif self._saving.failed and not peers.there(f"{number}/end"):
            return self._ended()  # rank 0 is lost; what it told its peers, it tells them at a boundary, too
        return None

    def wait(self) -> str | None:
        """Until the save under way is committed; its name. Raises what it failed with."""
        return self._ended() if self._saving is not None else None

    def _ended(self) -> str:
        assert self._saving is not None
        number, name, thread, failed = self._saving
        thread.join()
        self._saving = None
        if failed:
            raise failed[0]
        return name

    def _prepared(self, state: TrainState, name: Any, client_state: Any, metrics: Any, overwrite: bool) -> tuple[Any, BaseException | None]:
        """(name, leaves, manifest without arrays) or the error to tell."""
        try:
            text = folder.check_name(name)
            if not isinstance(state, TrainState) or int(state.step) < 0:
                raise ValueError("save: it takes a TrainState that was not donated; give the state that step(...) returned")
            found = named(state, self.peers.rank, self.peers.size)
            encoded, arrays = client.encode(client_state)
            for key in arrays:
                if key in found.parts:
                    raise ValueError(f"save: {key!r} is both in the state and in the client state; rename a transform")
            found = found._replace(parts=found.parts | {key: whole(x)._replace(first=True) for key, x in arrays.items()})
            numbers = {str(k): float(v) for k, v in (metrics or {}).items()}
            about = {"config": self._config}
            if self._step is not None:
                about |= {"chain": _chain(self._step), "specs": _specs(found)}
            told = Manifest(
                text, 0, int(state.step), int(state.updates), {}, found.ties, numbers, encoded, self.peers.size, window(state), about, manifest.versions()
            )  # fmt: skip
            if self.peers.rank == 0:
                refuse_taken(self.directory, text, overwrite)
            return (text, found, told), None
        except (ValueError, TypeError, OSError, CheckpointError) as e:
            return None, e

    def _agreed(self, number: int, name: str, error: BaseException | None) -> dict[str, Any]:
        """All ranks are here and well: rank 0's name and everybody's coordinates; or one error for all."""
        peers = self.peers
        if peers.rank == 0:
            try:
                all_ready = peers.wait([(r, f"{number}/ready/{r}") for r in range(peers.size)], "save", join=self.join)
                bad = next(((r, a["error"]) for r, a in enumerate(all_ready) if a["error"]), None)
                go = {"name": name, "coords": [a["coords"] for a in all_ready], "error": bad}
            except CheckpointError as e:
                go = {"error": (0, spoken(e))}
            peers.put(f"{number}/go", go)
        (go,) = peers.wait([(0, f"{number}/go")], "save", join=self.join + 10)
        peers.forget(number)  # all are here
        if go["error"]:
            rank, (kind, text) = go["error"]
            if error is not None:
                raise error
            raise KINDS.get(kind, CheckpointError)(text if peers.rank == rank or kind == "CheckpointError" else f"{text} (rank {rank})")
        return go

    def names(self) -> list[str]:
        """The committed checkpoints in order of their commits; rank 0 looks, and all get the same answer."""
        self._number += 1
        key, peers = f"{self._number}/names", self.peers
        if peers.rank == 0:
            found = folder.listing(self.directory, self.max_metadata)
            peers.put(key, [[e.path.name.removesuffix(folder.NEW) for e in found.entries], list(found.damaged)])
        ((whole, damaged),) = peers.wait([(0, key)], "names", join=self.join)
        return [*whole, *damaged]

    def restore(
        self,
        name: int | str | float = "latest",
        *,
        like: TrainState | tuple[Any, Any],
        strict: bool = True,
        only: str | Sequence[str] = (),
        rename: Sequence[tuple[str, str]] = (),
        fallback: bool = False,
        donate: bool = False,
    ) -> Restored:
        """A state of the form of `like`, filled from a checkpoint of any world, mesh and stage; each rank reads its ranges alone.

        Args:
          name: a checkpoint's, "latest" (the last committed), or "best".
          like: a state; or (step, params) with params whole or meta tensors, and the state is built here.
          strict: names and shapes must match both ways; otherwise leaves that are missing stay as `like` has them, and others are left out.
          only: regexes on names ("^params/"): others stay as `like` has them.
          rename: (regex, replacement) from the state's names to the checkpoint's.
          donate: fill the memory of `like`, a state, instead of new memory; what is not read stays, and after an error it holds some of both.
          fallback: pass over damaged checkpoints, with a line each.

        Raises:
          CheckpointError: nothing there, half there, damaged, or of another model; it says what was found. On all ranks.
        """
        self.wait()
        self._number += 1
        number, peers = self._number, self.peers
        only = (only,) if isinstance(only, str) else tuple(only)
        want = Want(strict, only, tuple(rename))
        if isinstance(like, TrainState):
            target, given, step = like, like, self._step
            fresh: Callable[[], TrainState] = lambda: given
        else:
            step = like[0]
            target, fresh = template(*like)
        device = target.params.buffers[0].device if step is None else step.running().env.mesh.device
        with peers.beating():
            peers.put(f"{number}/ready/{peers.rank}", {"coords": _coords(target), "error": None})
            choices = self._choices(number, name, fallback)
            coords = [{a: tuple(c) for a, c in r["coords"].items()} for r in peers.wait([(r, f"{number}/ready/{r}") for r in range(peers.size)], "restore", join=self.join)]
            peers.forget(number)  # all are here
            context = Context(peers.rank, peers.size, coords, None if step is None else _chain(step), device, donate and isinstance(like, TrainState))
            problems = []
            for attempt, path in enumerate(choices):
                result, problem = self._tried(Path(path), target, fresh, want, context, f"{number}/read/{attempt}")
                if result is not None:
                    for note in result.notes if peers.rank == 0 else ():
                        logging.warning("restore %s: %s", result.name, note)
                    return result
                problems.append(problem)
                if fallback and peers.rank == 0:
                    logging.warning("%s; passed over", problem)
        raise CheckpointError("; ".join(problems))

    def _choices(self, number: int, name: int | str | float, fallback: bool) -> list[str]:
        """The folders to try, the same on all ranks."""
        if self.peers.rank == 0:
            try:
                found = folder.choose(self.directory, name, self.keep, fallback, self.max_metadata)
                answer: Any = [str(e.path) for e in found]
            except (CheckpointError, ValueError, OSError) as e:
                answer = {"error": spoken(e)}
            self.peers.put(f"{number}/choice", answer)
        (answer,) = self.peers.wait([(0, f"{number}/choice")], "restore", join=self.join)
        if isinstance(answer, dict):
            kind, text = answer["error"]
            raise KINDS.get(kind, CheckpointError)(text)
        return answer

    def _tried(self, path: Path, like: TrainState, fresh: Callable[[], TrainState], want: Want, context: Context, key: str) -> tuple[Restored | None, str]:
        """One checkpoint on all ranks: all have read it, or none has."""
        mine, done = "", None
        try:
            found = manifest.load(path, self.max_metadata)
            if self.peers.rank == 0 and (broken := manifest.check_files(path, found)):
                raise CheckpointError(f"checkpoint {str(path)!r}: {'; '.join(broken[:3])}{f'; and {len(broken) - 3} more' * (len(broken) > 3)}")
            state, notes = fill(path, found, like, fresh, want, context)
            name = path.name.removesuffix(folder.NEW)
            done = Restored(state, load_client(path, found), name, found.step, found.metrics, tuple(notes))
        except (CheckpointError, ValueError, TypeError, OSError) as e:
            mine = f"{sentence(e)} (in {str(path)!r})" if str(path) not in str(e) else sentence(e)
        self.peers.put(f"{key}/{context.rank}", mine)
        all_told = self.peers.wait([(r, f"{key}/{r}") for r in range(context.size)], "restore")
        bad = next(((r, text) for r, text in enumerate(all_told) if text), None)
        if bad is None:
            return done, ""
        return None, bad[1] + f" (rank {bad[0]})" * (context.size > 1)


def _coords(state: TrainState) -> dict[str, tuple[int, int]]:
    """This rank's place on every axis that the state names."""
    slots = [x for x in tree.leaves(state, is_leaf=lambda x: isinstance(x, Slots)) if isinstance(x, Slots)]
    return {axis: (size, index) for x in slots for axis, size, index in x.where.coords}


def _chain(step: Any) -> str:
    """A step's chain as it is printed, on which mesh; whether it donates is no matter."""
    return str(step).replace(", donated", "", 1)


def _specs(found: Names) -> dict[str, str]:
    return {n: repr(p.where.spec(p.leaf)) for n, p in found.parts.items() if p.where is not None}



"""Saves beside the training, and restores, on all ranks together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from torch import Tensor

from funczero.checkpoint import client, folder, lines, manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.folder import Keep
from funczero.checkpoint.layout import Deal, deal
from funczero.checkpoint.manifest import Manifest
from funczero.checkpoint.names import Names, refuse_collisions, whole
from funczero.checkpoint.peers import Peers
from funczero.checkpoint.preparing import Asked, agreed
from funczero.checkpoint.reading import Reading, Restored, restored
from funczero.checkpoint.saving import Job, Passing, Save, arrays_of, refuse_taken, sentence, spoken
from funczero.checkpoint.staging import Held, Staging, Values
from funczero.checkpoint.target import Want
from funczero.core.types import TrainState
from funczero.world import ending, presence


class Checkpointer:
    """Checkpoints of a run in a folder that all ranks share: orbax's format, any world reads what any world wrote.

    Law: `restore(like=...)` of what was saved gives the same bits in every leaf, on any mesh and at any stage; a
    checkpoint is there whole or not at all. Every method is called by all ranks, at the same place of the loop;
    failures are raised on all of them.

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
        silence: float = lines.SILENCE,
        max_metadata: int = manifest.LIMIT,
        passing: Passing = lambda point: None,
    ) -> None:
        """Nothing is written yet.

        Args:
          directory: shared by all ranks; made at the first save.
          keep: how many of the latest stay; None: all.
          keep_period: of those at every such step, all stay.
          best: (metric, "min" or "max"): the best by `metrics` stays, too, and is found as "best".
          step: the Step, to write its chain and specs beside the arrays, and to continue an open window of a streamed
            accumulate.
          config: anything of JSON to write beside the arrays, such as the resolved flags.
          join: seconds in which all ranks must come to a save or restore.
          silence: seconds without a sign of life after which a rank inside a call is taken for dead; the same on all
            ranks, which give eight signs in that time.
          max_metadata: bytes of a manifest that are read.
          passing: called with the name of every point of a save as this rank passes it (`saving.Passing`), beside the
            training from "begun" on; the save fails with what it raises.
        """
        if keep is not None and keep < 1 or keep_period is not None and keep_period < 1:
            raise ValueError(
                f"Checkpointer: keep={keep} and keep_period={keep_period} count checkpoints and steps; write numbers of"
                " at least 1, or None"
            )
        if best is not None and (len(best) != 2 or best[1] not in ("min", "max")):
            raise ValueError(
                f"Checkpointer: best={best!r} is not a metric and 'min' or 'max'; write best=('eval/loss', 'min')"
            )
        self.directory, self.keep = Path(directory), Keep(keep, keep_period, best)
        self.join, self.silence, self.max_metadata, self._passing = join, silence, max_metadata, passing
        self._step, self._config = step, client.encode(config, "config")[0]
        self._peers: Peers | None = None
        self._polls = 0
        self._saving: Save | None = None
        self._staging = Staging()
        self._named: set[str] = set()
        ending.prepared()
        with contextlib.suppress(RuntimeError):  # `save` and `restore` say that the store is gone
            presence.announce()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the save under way, after an error, too, which then also says that the save failed."""
        try:
            self.close()
        except Exception as lost:
            if error is None:
                raise
            error.add_note(f"funczero: besides, {sentence(lost)}")

    def close(self) -> None:
        """Wait for the save under way."""
        self.wait()

    def _joined(self, step: Any = None) -> Peers:
        """The ranks of the world, which is joined through the step where there is one; never by the environment,
        which tools inherit.
        """
        step = self._step if step is None else step
        if step is not None:
            step.running()
        if self._peers is None or not self._peers.current:
            self._peers = Peers(silence=self.silence)
        return self._peers

    def save(
        self,
        state: TrainState,
        name: int | str | float,
        *,
        client_state: Any = None,
        metrics: Mapping[str, float] | None = None,
        overwrite: bool = False,
        without: Iterable[str] = (),
    ) -> None:
        """Copy this rank's part and return; it is written beside the training, and committed by one rename.

        The step waits for one copy of what this rank writes, and for an earlier save that is not finished. The state
        may be donated right after.

        Args:
          name: an int or a printable tag; where ranks name different ones, rank 0's counts.
          client_state: rank 0's, kept beside the arrays: plain values, tensors, numpy arrays; tuples, int keys and NaN
            come back as they are.
          metrics: numbers, for `best`.
          overwrite: replace a checkpoint of this name; otherwise that is an error.
          without: names of parameters ("params/<path>") that are left out, as frozen ones whose values are known; it
            restores with strict=False, into a state that has them.

        Raises:
          ValueError, TypeError, FileExistsError: on all ranks, before anything is written.
          CheckpointError: an earlier save failed, or a rank does not come.
        """
        self.wait()
        peers = self._joined()
        number, begun = peers.begin(), False
        try:
            clients = client_state if peers.rank == 0 else None
            asked = Asked(state, name, clients, metrics, overwrite, self._passing, frozenset(without))
            found, told, coords = agreed(asked, self.directory, peers, number, self._step, self._config, self.join)
            share = self._staging.dealt(found, coords, peers.rank)
            values = self._staging.copied(found, share, peers.rank)
            self._passing("copied")
            self._start(number, peers, overwrite, told, found, share, values)
            begun = True
        finally:
            if not begun:
                self._staging = Staging()  # a thread that an interrupt has cut off from here may be writing the copy
                peers.over(number)

    def save_named(
        self,
        found: Names,
        name: str,
        read: Mapping[str, Callable[[], Tensor]] = MappingProxyType({}),
        *,
        rows: Mapping[str, Callable[[int, int], Tensor]] = MappingProxyType({}),
        step: int = 0,
        updates: int = 0,
        client_state: Any = None,
    ) -> None:
        """Save leaves by their names as one process, without a state and without a copy: the tensors stay untouched
        until `wait`.

        Args:
          read: leaves that are made when they are written, one after the other, of which `found` has shapes on the
            meta device.
          rows: of these, leaves of which some rows can be had without the others, from and to.
        """
        self.wait()
        encoded, arrays = client.encode(client_state)
        found = found._replace(parts=found.parts | {key: whole(x)._replace(first=True) for key, x in arrays.items()})
        refuse_collisions(list(found.parts))
        refuse_taken(self.directory, name, overwrite=False)
        about = {"config": self._config}
        told = Manifest(name, 0, step, updates, {}, found.ties, {}, encoded, 1, {}, about, manifest.versions())
        share = deal(found.parts, [{}], 0)
        peers = Peers(alone=True)
        self._start(peers.begin(), peers, False, told, found, share, Values(found, share, read, rows))

    def _start(
        self,
        number: int,
        peers: Peers,
        overwrite: bool,
        told: Manifest,
        found: Names,
        share: Deal,
        values: Iterable[Held],
    ) -> None:
        arrays = arrays_of(found, share)
        where = self.directory, self.keep, self.max_metadata, overwrite
        self._saving = Save(Job(number, *where, told, arrays, share, values, self._named, self._passing), peers)

    def poll(self) -> str | None:
        """At a step boundary: has the save under way ended? Its name if it is committed now; all ranks are told at the
        same boundary.

        Raises:
          CheckpointError: it failed.
        """
        self._polls += 1
        if self._saving is None:
            return None
        if self._saving.peers.size == 1:
            return self._ended() if self._saving.ended.is_set() else None
        try:
            over = self._told(self._saving)
        except CheckpointError:  # the store is gone: there is no common boundary any more, only what this rank knows
            over = True
        return self._ended() if over else None

    def _told(self, saving: Save) -> bool:
        """Have all ranks been told, up to this boundary, that a save has ended?"""
        peers, number = saving.peers, saving.job.number
        key = f"{number}/told"
        if peers.there(key):
            return peers.get(key) <= self._polls
        if peers.rank == 0 and saving.ended.is_set():
            # seen by all at the next boundary: no rank gets there before rank 0 has left this one
            peers.put(key, self._polls + 1)
            return False
        # rank 0 is lost; what it told its peers, it tells them at a boundary, too
        return saving.error is not None and not peers.there(f"{number}/end")

    def wait(self) -> str | None:
        """Until the save under way is committed; its name. Raises what it failed with."""
        return self._ended() if self._saving is not None else None

    def _ended(self) -> str:
        assert self._saving is not None
        saving = self._saving
        saving.ended.wait()
        self._saving = None
        with contextlib.suppress(CheckpointError):  # the store may be gone; what counts is what the save came to
            saving.peers.over(saving.job.number)
        saving.result()
        return saving.job.told.name

    def names(self) -> list[str]:
        """The committed checkpoints in order of their commits; rank 0 looks, and all get the same answer."""
        peers = self._joined()
        key = f"{(number := peers.begin())}/names"
        peers.enter(number, "names")
        if peers.rank == 0:
            try:
                found = folder.listing(self.directory, self.max_metadata)
                answer: Any = [[e.path.name.removesuffix(folder.NEW) for e in found.entries], list(found.damaged)]
            except OSError as e:
                answer = {"error": spoken(e)}
            peers.put(key, answer)
        self._passing("awaits")
        (answer,) = peers.wait([(0, key)], "names", join=self.join)
        peers.over(number)
        if isinstance(answer, dict):
            raise CheckpointError(f"names: {answer['error'][1]}")
        return [*answer[0], *answer[1]]

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
        """A state of the form of `like`, filled from a checkpoint of any world, mesh and stage; each rank reads its
        ranges alone.

        Args:
          name: a checkpoint's, "latest" (the last committed), or "best".
          like: a state; or (step, params) with params whole or meta tensors, and the state is built here.
          strict: names and shapes must match both ways; otherwise leaves that are missing stay as `like` has them, and
            others are left out.
          only: regexes on names ("^params/"): others stay as `like` has them.
          rename: (regex, replacement) from the state's names to the checkpoint's.
          donate: fill the memory of `like`, a state, instead of new memory; what is not read stays, and after an error
            amid the reading it is used up, as by fz.donate, until a restore of all of it succeeds.
          fallback: pass over damaged checkpoints, with a line each.

        Raises:
          CheckpointError: nothing there, half there, damaged, or of another model; it says what was found. On all
            ranks.
        """
        self.wait()
        given = isinstance(like, TrainState)
        if not given and not (isinstance(like, tuple) and len(like) == 2 and hasattr(like[0], "running")):
            raise TypeError(
                f"restore: like= is a {type(like).__name__}; give a TrainState, or (step, params) with params whole or"
                " meta tensors"
            )
        step = self._step if given else like[0]
        peers = self._joined(step)
        number = peers.begin()
        try:
            want = Want(strict, (only,) if isinstance(only, str) else tuple(only), tuple(rename))
            where = self.directory, self.keep, self.max_metadata
            reading = Reading(peers, number, *where, self.join, want, self._passing)
            return restored(reading, name, like, step, fallback, donate and given)
        finally:
            with contextlib.suppress(CheckpointError):  # the store may be gone
                peers.over(number)

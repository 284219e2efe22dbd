"""One rank's run: updates, evaluations, checkpoints, and an end at a step boundary where somebody asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funczero.checkpoint.checkpointer import Checkpointer
from funczero.checkpoint.notice import Notice
from funczero.comm.launch import count_bytes
from funczero.core.types import Metrics, TrainState
from funczero.layout.processes import init_distributed
from funczero.script.plot import plot
from funczero.script.progress import Clock, Shown, line
from funczero.script.record import Record, write_plan
from funczero.script.run import Run
from funczero.step.train_step import donate
from funczero.world.sent import Sent
from funczero.writers import Csv, JsonLines, TensorBoard, Tracker, Writer, records
from funczero.writers import number as number_of

if TYPE_CHECKING:
    from funczero.script.experiment import Experiment


SAME = ("seed", "batch")  # flags that a resumed run should have as the run that saved
TAKEN = ("step", "loss", "bytes_sent", "lr", "grad_norm", "ok", "scale")  # names of every update's own numbers


class Begun(NamedTuple):
    """Where a run begins."""

    state: TrainState
    evaluated: int  # the update of the last evaluation; -1: none
    name: str = ""  # the checkpoint it was read from


def train(run: Run, own: Experiment, plans: bool = False) -> None:
    """One rank's run, in a world that a launcher has described.

    Args:
      plans: rank 0 writes plan.json before it begins, since nobody else does.
    """
    torch.set_num_threads(run.threads)
    speaks = init_distributed().rank == 0
    step = own.step if own.step.grad.env.donate else donate(own.step)
    own = own._replace(step=step)
    if plans and speaks:
        write_plan(run, own)
    saved = Checkpointer(run.folder / "checkpoints", keep=run.keep, step=step, config=run.said())
    begun = begin(run, own, saved, speaks)
    start = int(begun.state.step)
    if start > run.steps:
        if speaks:
            print(f"{run.script}: {start} updates are made, more than --steps={run.steps}", file=sys.stderr)
        sys.exit(2)
    told = Told(run, own, start, speaks)
    count = sum(prod(leaf.shape) for leaf in begun.state.params.where.structure.leaves)
    about = f"{own.about}; " if own.about else ""
    told.shown.say(f"{step}\n{count:,} parameters, {about}results in {run.out}")
    with told.recorded(begun), told.shown.bar, Notice() if run.save_every else nullcontext() as notice:
        state = updates(run, own, begun, saved, told, notice)
        told.record.committed(saved.wait())
        if state is not None:
            said = "" if own.finish is None else own.finish(state)
            told.finished(said)
    told.close()


def begin(run: Run, own: Experiment, saved: Checkpointer, speaks: bool) -> Begun:
    """The state to start from; a fresh one in place of a checkpoint only by --resume=auto, which says so."""
    if run.resume == "auto" and not saved.names():
        if speaks:
            said = f"{saved.directory} holds no checkpoint; this run starts at update 0"
            print(f"{run.script}: {said}", file=sys.stderr)
    elif run.resume != "never":
        found = saved.restore("latest" if run.resume == "auto" else run.resume, like=(own.step, own.params))
        client = found.client_state if isinstance(found.client_state, dict) else {}
        other = [f"--{name}={client[name]}" for name in SAME if client.get(name, run.said()[name]) != run.said()[name]]
        if other and speaks:
            said = f"{found.name} was saved with {' '.join(other)}; from here on batches are others"
            print(f"{run.script}: checkpoint {said}", file=sys.stderr)
        return Begun(found.state, client.get("evaluated", -1), found.name)
    return Begun(own.step.init(own.params, key=run.seed), -1)


def updates(
    run: Run, own: Experiment, begun: Begun, saved: Checkpointer, told: Told, notice: Notice | None
) -> TrainState | None:
    """The updates that are left; the last state, or None where somebody told the run to end."""
    state, evaluated, _ = begun
    start = int(state.step)
    due = lambda n: own.evaluate is not None and (n % run.eval_every == 0 or n == run.steps)
    if due(start) and evaluated != start:
        told.evaluated(start, own, state)
        evaluated = start
    rows = batches(run, own, start)
    for number in range(start + 1, run.steps + 1):
        with count_bytes(own.step) as sent:
            state, metrics = own.step(state, next(rows))
        assert metrics is not None
        told.updated(number, metrics, sent, state)
        if notice is not None:
            told.record.committed(saved.poll())
        asked, best = notice is not None and notice.given(), dict[str, float]()
        if due(number) and not asked:
            best, evaluated = told.evaluated(number, own, state), number
        if notice is not None and (asked or number % run.save_every == 0 or number == run.steps):
            best["loss"] = metrics.loss.item()
            beside = {"evaluated": evaluated} | {name: run.said()[name] for name in SAME}
            told.record.committed(saved.wait())
            saved.save(state, number, client_state=beside, metrics=best)
        if asked and notice is not None:
            told.record.committed(saved.wait())
            who = notice.name or "a signal to another process"
            told.shown.say(f"stopped by {who} after update {number}; --resume=auto goes on from there")
            told.record.ended("stopped", f"by {who}")
            return None
    return state


def batches(run: Run, own: Experiment, start: int) -> Iterator[Any]:
    """This rank's rows of every update from `start` on.

    Raises:
      RuntimeError: the script's batches end before the run does.
    """
    if own.batch is not None:
        for number in range(start, run.steps):
            yield own.step.local_rows(own.batch(number), run.micro_batch)
        return
    assert own.batches is not None
    made = start
    for rows in own.batches(start):
        yield rows
        made += 1
    what = f"its batches end after update {made} of --steps={run.steps}"
    raise RuntimeError(f"{run.script}: {what}; give more, or write --steps={max(made, 1)}")


class Told:
    """What rank 0 writes and shows; the other ranks are silent."""

    def __init__(self, run: Run, own: Experiment, start: int, speaks: bool) -> None:
        """start: updates that are made already."""
        self._run, self._own, self._speaks = run, own, speaks
        self.shown = Shown(speaks, start, run.steps)
        self._clock = Clock(run.batch * own.per_row)
        self._writers = _writers(run, own, start or None) if speaks else []
        self.record = Record(run.folder if speaks else None, not start, self.shown.say)

    @contextmanager
    def recorded(self, begun: Begun) -> Iterator[None]:
        """While it lasts the run is under way; how it ends is recorded."""
        self.record.began(self._run, self._own, begun.state, begun.name)
        with self.record.hearing():
            try:
                yield
            except BaseException as error:
                first = (str(error).splitlines() or [""])[0]
                self.record.ended("failed", f"{type(error).__name__}: {first}")
                raise

    def updated(self, number: int, m: Metrics, sent: Sent, state: TrainState) -> None:
        """An update has been made."""
        if not self._speaks:
            return
        rate, own = self._clock.update(), _named("numbers", self._own.numbers(m)) if self._own.numbers else {}
        scalars = {name: getattr(m, name).item() for name in ("lr", "grad_norm", "ok", "scale")}
        speed = {f"{self._own.unit}_per_second": rate, "bytes_sent": sum(sent.values())}
        values = {"loss": m.loss.item(), **own, **speed, **scalars}
        self._write(number, values)
        self.record.updated(number, sent, self._own.step, state)
        self.shown.update(number, line(values, own, self._own.unit, self._clock.smooth))

    def evaluated(self, number: int, own: Experiment, state: TrainState) -> dict[str, float]:
        """An evaluation, on all ranks: its numbers."""
        assert own.evaluate is not None
        values = _named("evaluate", own.evaluate(state))
        if self._speaks:
            self._write(number, values)
            self.shown.evaluated(number, values)
        self._clock.pause()  # this was no training
        return values

    def finished(self, text: str) -> None:
        """The plot, and the script's last word."""
        if self._speaks:
            run, path = self._run, self._run.folder / "loss.png"
            self.record.ended("finished", "")
            title = f"{run.script}, seed {run.seed}"
            for said in (plot(path, records(run.folder / "metrics.jsonl"), self._own.plot, title), text):
                if said:
                    self.shown.say(said)

    def close(self) -> None:
        """All that was told is on disk."""
        for writer in self._writers:
            writer.close()
        self.record.close()

    def _write(self, number: int, values: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.log(number, values)


def _named(who: str, values: Mapping[str, Any]) -> dict[str, float]:
    """A script's numbers, plain, under names of their own.

    Raises:
      ValueError: one has the name of an update's own number.
    """
    odd = next((name for name in values if name in TAKEN), None)
    if odd is not None:
        raise ValueError(f"{who}: {odd!r} is the name of an update's own number; write another, as 'held_out_{odd}'")
    return {name: number_of(name, x) for name, x in values.items()}


def _writers(run: Run, own: Experiment, after: int | None) -> list[Writer]:
    """metrics.jsonl, those of --write, and the script's own tracker."""
    made: list[Writer] = [JsonLines(run.folder / "metrics.jsonl", after)]
    made += [Csv(run.folder / "csv", after)] * ("csv" in run.write)
    if "tensorboard" in run.write:
        made.append(TensorBoard(run.folder / "tensorboard", after))
    if own.track is not None:
        made.append(Tracker(own.track()))
    return made

"""run.jsonl: what a run says of itself beside its numbers, a line an event, so that its folder alone tells what it was.

Every line is an object with `kind` and `time` (Unix seconds), written once and never changed. Kinds: `begin` (one a
start: what is run, by which flags, where), `state` (bytes at rest), `sent` (bytes of an update, where they are others
than before), `skip`, `said` (a warning of the log), `checkpoint` (committed), `end`. What was written of updates after
the one that a later `begin` starts from was undone by it. `plan.json` beside it is what fz.plan says.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy
import torch
import torch.distributed as dist

from funczero.core.types import TrainState
from funczero.core.version import version_of
from funczero.layout.processes import default_device, world_size
from funczero.planning.plan import plan
from funczero.planning.update import bytes_of
from funczero.script.run import Run
from funczero.step.step import Step
from funczero.transforms.skips import Skip
from funczero.world import environment
from funczero.world.sent import Sent

if TYPE_CHECKING:
    from funczero.script.experiment import Experiment

FILE, PLAN = "run.jsonl", "plan.json"
FORM = 1  # of these lines; a reader refuses a later one
CHANGES, WORDS = 256, 1024  # lines of `sent` and of `said` in one start


class Record:
    """Writes run.jsonl; what fails to be written is said once, and ends no run."""

    def __init__(self, folder: Path | None, fresh: bool, say: Callable[[str], None]) -> None:
        """Opens the file.

        Args:
          folder: None: nothing is written.
          fresh: the file begins anew.
          say: told once why nothing more is written.
        """
        self._say = say
        self._file = None if folder is None else self._opened(folder / FILE, fresh)
        self._sent: Sent | None = None
        self._changes, self._words, self._skip, self.update = 0, 0, -1, 0

    def _opened(self, path: Path, fresh: bool) -> TextIO | None:
        try:
            half = not fresh and path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            if fresh:  # another file, so that whoever reads it sees that it began anew
                path.unlink(missing_ok=True)
            file = path.open("a", encoding="utf-8")
            if half:  # a process was killed while it wrote
                file.write("\n")
            return file
        except OSError as error:
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        self._file = None
        self._say(f"{FILE} is not written any more ({type(error).__name__}: {error}); the run goes on without it")

    def note(self, kind: str, **values: Any) -> None:
        """One line."""
        if self._file is None:
            return
        try:
            line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, default=str)
            print(line, file=self._file, flush=True)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self._failed(error)

    def began(self, run: Run, own: Experiment, state: TrainState, before: str) -> None:
        """A start of the run.

        Args:
          state: that it starts from.
          before: the checkpoint that it was read from; "" without.
        """
        if self._file is None:
            return
        self.update = int(state.step)
        try:
            found, at_rest = about(run, own, state), bytes_of(state)
        except Exception as error:  # of a flag or a device that answers with an error
            self._failed(error)
            return
        self.note("begin", update=self.update, before=before, **found)
        self.note("state", bytes={name: n for name, n in at_rest.items() if n})

    def updated(self, number: int, sent: Sent, step: Step, state: TrainState) -> None:
        """An update was made.

        Args:
          number: of updates now.
          sent: its bytes.
          state: after it.
        """
        if self._file is None:
            return
        self.update = number
        if sent != self._sent and self._changes <= CHANGES:
            self._changes += 1
            more = {"more": True} if self._changes > CHANGES else {}
            self.note("sent", update=number, bytes=[[*key, n] for key, n in sorted(sent.items())], **more)
            self._sent = sent.copy()
        line = step.fits.book.line(state)
        last = None if line is None else line.skipped.last
        if last is not None and last.step != self._skip:
            self._skip = last.step
            self.skipped(last)

    def skipped(self, skip: Skip) -> None:
        """An update was not applied, and this is why."""
        values = {"words": skip.words, "leaf": skip.leaf, "rank": skip.rank, "searching": skip.searching}
        self.note("skip", update=skip.step + 1, **values)

    def committed(self, name: str | None) -> None:
        """A checkpoint is on disk; None: none has ended."""
        if name is not None:
            self.note("checkpoint", name=name, update=int(name) if name.isdigit() else self.update)

    def ended(self, how: str, words: str) -> None:
        """The run's last line.

        Args:
          how: finished, stopped or failed.
        """
        self.note("end", update=self.update, how=how, words=words)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Inside, warnings of the log are lines of the record, too."""
        heard, log = _Heard(self), logging.getLogger("absl")
        log.addHandler(heard)
        try:
            yield
        finally:
            log.removeHandler(heard)

    def heard(self, text: str) -> None:
        """A warning of the log."""
        self._words += 1
        if self._words <= WORDS:
            more = {"more": True} if self._words == WORDS else {}
            self.note("said", update=self.update, text=text, **more)


class _Heard(logging.Handler):
    def __init__(self, record: Record) -> None:
        super().__init__(logging.WARNING)
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        self._record.heard(record.getMessage())


def about(run: Run, own: Experiment, state: TrainState) -> dict[str, Any]:
    """What is run: plain values, of which none is a secret that the names of flags give away."""
    step, env = own.step, own.step.grad.env
    return {
        "form": FORM,
        "script": run.script,
        "steps": run.steps,
        "unit": own.unit,
        "amount": run.batch * own.per_row,  # units of an update
        "chain": str(step),
        "about": own.about,
        "mesh": env.mesh.sizes(),
        "brackets": list(env.rules),
        "edges": {axis: str(edge) for axis, edge in env.edges.items()},
        "policy": str(env.policy),
        "parameters": sum(prod(leaf.shape) for leaf in state.params.where.structure.leaves),
        "flags": run.told(),
        "environment": surroundings(run),
    }


def surroundings(run: Run) -> dict[str, Any]:
    """Where it runs. Of the process's environment only what the house itself reads is looked at."""
    device, here = default_device(), int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0)
    named = torch.accelerator.is_available() and getattr(torch, device.type, None)
    name = f" ({named.get_device_name(0)})" if named and hasattr(named, "get_device_name") else ""
    world = world_size()
    return {
        "funczero": version_of("funczero", "from its folder"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type + name,
        "world": world,
        "hosts": 1 if world == 1 else world // here if here and world % here == 0 else "not said by the launcher",
        "launcher": launcher(os.environ),
        "backend": dist.get_backend() if dist.is_initialized() else "none",
        "threads": run.threads,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "kernels": os.environ.get("FUNCZERO_KERNELS", "by default"),
    }


def launcher(environ: Mapping[str, str]) -> str:
    """Who started the processes, as far as they are told.

    >>> launcher({}), launcher({"RANK": "0"}), launcher({"RANK": "0", "TORCHELASTIC_RUN_ID": "1"})
    ('none', "the script, or another one in torchrun's words", 'torchrun')
    """
    found = environment.launcher(environ)
    if found == "torchrun" and "TORCHELASTIC_RUN_ID" not in environ:
        return "the script, or another one in torchrun's words"
    return found or "none"


def write_plan(run: Run, own: Experiment) -> None:
    """plan.json: what fz.plan says of the step on its mesh, or why it says nothing. It ends no run.

    Law: what is drawn afterwards is what would have been drawn without it.
    """
    begun, path = time.process_time(), run.folder / PLAN
    try:
        path.unlink(missing_ok=True)  # of an earlier start, on another mesh maybe
        with _draws_kept():
            found = _planned(own)
    except Exception as error:  # whatever a plan refuses, the run itself may do
        found = {"why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    found |= {"seconds": round(time.process_time() - begun, 3)}
    try:
        part = path.with_name(f".{PLAN}.part")
        part.write_text(json.dumps(found))
        os.replace(part, path)
    except OSError as error:
        print(f"{run.script}: {PLAN} is not written ({error}); the run goes on without it", file=sys.stderr)


@contextmanager
def _draws_kept() -> Iterator[None]:
    """The script's batches and loss may draw from what is the process's; other ranks do not plan."""
    kept = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def _planned(own: Experiment) -> dict[str, Any]:
    batch = None if own.batch is None else own.batch(0)
    found = plan(own.step, own.params, batch)
    memory: Mapping[str, Any] = found.memory._asdict()
    return {
        "sent": [[*key, n] for key, n in sorted(found.sent.items())],
        "memory": dict(memory),
        "flops": found.flops,
        "rank": found.rank,
        "notes": list(found.notes),
    }

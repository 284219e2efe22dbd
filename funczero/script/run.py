"""What the command line of an experiment says, checked before any process is started."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from absl import flags

from funczero.layout.processes import world_rank
from funczero.script.flags import WRITERS
from funczero.step.step import Step
from funczero.step.train_step import donate, train_step
from funczero.step.zero import zero

# what a script reads to build its step and its batches: given and read by nobody, one of them would be passed over
BUILDING = ("stage", "mesh", "policy", "sums", "batch", "accumulate", "micro_batch", "debug")
SECRET = re.compile(r"(^|_)(api_?key|access_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)


class Run:
    """A script's command line: every flag is an attribute, its own flags too, as `run.lr`; the same in every process.

    `run.mesh` is the mesh as sizes, `run.axis` its axes, over which a batch is split: P(run.axis).
    """

    def __init__(self, script: str, rows: str = "rows", values: flags.FlagValues = flags.FLAGS) -> None:
        """Reads parsed flags.

        Args:
          script: how messages name it.
          rows: what a row of a batch is called.
          values: absl's flags.

        Raises:
          ValueError: flags contradict each other, or the mesh does not lay out the processes.
        """
        self.script, self._rows, self._values = script, rows, values
        self._instead, self._read = dict[str, Any](), set[str]()
        self.sizes = sizes(self._flag("mesh"), self._flag("nproc"))
        resume, write = self._flag("resume"), self._flag("write")
        odd = [w for w in write if w not in WRITERS]
        if resume not in ("auto", "never") and not resume.isdigit():
            raise ValueError(f"--resume={resume} is neither auto, never nor a number of updates; write --resume=auto")
        if odd:
            raise ValueError(f"--write={odd[0]} is no writer; write some of {', '.join(WRITERS)}")
        if "tensorboard" in write and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--write=tensorboard: it is not installed; write pip install 'funczero[tensorboard]'")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values and name not in self._instead:
            raise AttributeError(f"run.{name}: the script has no such flag; define it with absl's flags.DEFINE_...")
        self._read.add(name)
        return self._flag(name)

    def _flag(self, name: str) -> Any:
        return self._instead[name] if name in self._instead else self._values[name].value

    @property
    def mesh(self) -> dict[str, int]:
        """Axis -> processes, outermost first."""
        self._read.add("mesh")
        return dict(self.sizes)

    @property
    def axis(self) -> tuple[str, ...]:
        """The mesh's axes."""
        return tuple(self.mesh)

    @property
    def world(self) -> int:
        """All processes of the run, which may still have to be started."""
        return math.prod(self.sizes.values())

    @property
    def rank(self) -> int:
        """This process among them."""
        return world_rank()

    @property
    def folder(self) -> Path:
        """--out as a path."""
        return Path(self._flag("out"))

    @property
    def accumulate(self) -> int:
        """Micro-batches an update in each process, by --accumulate or by --micro_batch.

        Raises:
          ValueError: --batch does not divide into them.
        """
        batch, micro, k = self.batch, self.micro_batch, self._flag("accumulate")
        self._read.add("accumulate")
        if micro is not None:
            if self.given("accumulate"):
                raise ValueError(f"--accumulate={k} and --micro_batch say it twice; leave one of them out")
            if batch % micro:
                what = f"--batch={batch} {self._rows} are no multiple of --micro_batch={micro}"
                raise ValueError(f"{what}; write --batch={micro * math.ceil(batch / micro)}")
            return math.ceil(batch / micro / self.world)
        if batch % (micros := self.world * k):
            raise ValueError(
                f"--batch={batch} {self._rows} do not divide into {micros} micro-batches (processes x"
                f" --accumulate={k}); write --batch={micros * math.ceil(batch / micros)}"
            )
        return k

    def train_step(self, source: Any, *transforms: Any) -> Step:
        """The step of --stage, --accumulate, --mesh, --policy, --sums and --debug, which donates its states.

        Args:
          source: fz.value_and_grad(loss_fn, batch=P(run.axis)).
          transforms: what works on the mean: scale_loss, clips, the optimizer last.
        """
        chain = zero(source, *transforms, stage=self.stage, axis=self.axis, accumulate=self.accumulate)
        return donate(train_step(*chain, mesh=self.mesh, policy=self.policy, sums=self.sums, debug=self.debug))

    def instead(self, of: str, **values: Any) -> None:
        """What a file says in place of flags: `run.batch` and the others are these from now on.

        Args:
          of: the flag that names the file.
          values: by flag; None where the file's word needs none.

        Raises:
          ValueError: one of these flags was given as well.
        """
        twice = next((name for name in values if self.given(name)), None)
        if twice is not None:
            said = f"--{twice}={self._values[twice].value} and --{of}={self._values[of].value}"
            raise ValueError(f"{said} say it twice; write it in the file alone")
        self._instead.update(values)

    def passed_over(self) -> list[str]:
        """Flags for the step and the batches that were given and that the script has not read."""
        return [name for name in BUILDING if self.given(name) and name not in self._read]

    def said(self) -> dict[str, Any]:
        """Every flag's value, to be kept beside checkpoints."""
        return {**self._values.flag_values_dict(), **self._instead}

    def told(self) -> dict[str, Any]:
        """The flags of the experiment and of the script for whoever reads of the run: {name: [value, given?]}.

        absl's own are left out, and the values of those whose name says that it is a secret.
        """
        absl = lambda name: str(self._values.find_module_defining_flag(name)).startswith("absl.")
        hide = lambda name, x: "(a secret is not written)" if SECRET.search(name) and x else x
        return {n: [hide(n, x), n in self._values and self.given(n)] for n, x in self.said().items() if not absl(n)}

    def given(self, name: str) -> bool:
        """Does the command line name this flag?"""
        return bool(self._values[name].present)


def sizes(text: str, nproc: int | None) -> dict[str, int]:
    """--mesh as axis sizes for the processes of a launcher, of --nproc, or of this machine.

    Raises:
      ValueError: it names no axes and sizes, or does not lay out so many processes.

    >>> sizes("node=2,local=-1", 8), sizes("", 3)
    ({'node': 2, 'local': 4}, {'data': 3})
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else nproc
    pairs = [part.partition("=") for part in text.split(",") if part]
    counts = lambda size: size.removeprefix("-").isdigit() and (int(size) > 0 or int(size) == -1)
    if not all(name and counts(size) for name, _, size in pairs):
        said = f"--mesh={text} does not name axes and their sizes"
        raise ValueError(f"{said}; write --mesh=data=2 or --mesh=node=2,local=2")
    mesh = {name: int(size) for name, _, size in pairs} or {"data": -1}
    free, sized = [name for name, n in mesh.items() if n == -1], math.prod(n for n in mesh.values() if n > 0)
    world = world or (max(torch.accelerator.device_count() or 2, sized) if free else sized)
    if len(mesh) < len(pairs) or len(free) > 1 or (world % sized if free else world != sized):
        raise ValueError(
            f"--mesh={text} does not lay out {world} processes; name each axis once, one of size -1 at most, and"
            " sizes that multiply to them"
        )
    return mesh | {name: world // sized for name in free}

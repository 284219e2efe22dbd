"""`fz.experiment`: a script says what it trains, and the rest is its command line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from absl import app

from funczero.core.types import ChainError, Metrics, TrainState
from funczero.layout.processes import default_device
from funczero.script.flags import define
from funczero.script.loop import train
from funczero.script.processes import follow_parent, launch
from funczero.script.record import write_plan
from funczero.script.run import Run
from funczero.step.step import Step
from funczero.world import environment


class Experiment(NamedTuple):
    """What a script trains.

    Either `batch` or `batches` is given. A batch is a function of the number of updates made, so a run that is resumed
    goes on with the next one.
    """

    step: Step  # run.train_step(...), or one of your own
    params: Any  # the first parameters, as step.init takes them
    batch: Callable[[int], Any] | None = None  # updates made -> the next global batch; its rows are dealt
    batches: Callable[[int], Iterable[Any]] | None = None  # updates made -> this rank's rows, batch by batch from there
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None  # called by all ranks; rank 0's numbers count
    numbers: Callable[[Metrics], Mapping[str, float]] | None = None  # more numbers of an update, logged and shown
    finish: Callable[[TrainState], str] | None = None  # called by all ranks at the end; rank 0 prints what it returns
    unit: str = "rows"  # of which so many a second are shown,
    per_row: float = 1.0  # and so many are in a row
    plot: Sequence[str] = ("loss",)  # what loss.png shows, by the names in metrics.jsonl
    track: Callable[[], Any] | None = None  # opens a run of wandb's shape, on rank 0
    about: str = ""  # what is printed at the start


def experiment(begin: Callable[[Run], Experiment], rows: str = "rows", **defaults: Any) -> None:
    """Runs a script's command line: checks it, starts its processes or is one of them, trains, and ends.

    Law: `begin` runs once before any process is started, where what it refuses (ValueError, OSError, RuntimeError,
    ChainError) is one sentence and exit code 2, and once in every process, alike, with torch's generator at --seed.
    What is computed is a function of the flags: a run that was ended and resumed has the bits of one that was not, on
    other processes too where sums are exact or worlds are powers of two.

    `python script.py` starts --nproc processes; under torchrun, `funczero launch`, mpirun and srun it is one of theirs.
    Rank 0 writes --out/metrics.jsonl, a line an update (step, loss, <unit>_per_second, bytes_sent, lr, grad_norm, ok,
    scale, and `numbers`) and a line an evaluation, shows progress, and draws loss.png. With --save_every there are
    checkpoints, SIGTERM and SIGUSR1 save and end, and --resume=auto goes on. Time of evaluations counts into no rate.

    Args:
      begin: what the flags ask for, built.
      rows: what a row of a batch is called, in --help and in messages.
      defaults: of the flags, by name, as steps=800.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-c ends this process without a traceback
    launched = follow_parent()
    script = Path(sys.argv[0]).stem
    define(script, rows, defaults)
    app.run(partial(_main, begin, script, rows, launched))


def _main(begin: Callable[[Run], Experiment], script: str, rows: str, launched: bool, argv: list[str]) -> None:
    try:
        environment.adopt()  # SLURM's and MPI's words for rank and world, in torchrun's
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} is not a flag; write --flag=value, or --help for the list")
        run = Run(script, rows)
        own = planned(begin, run)
    except (ValueError, OSError, RuntimeError, ChainError) as error:
        alike = isinstance(error, (ValueError, ChainError)) and _meant(error)  # in every process of a machine
        if os.environ.get("LOCAL_RANK", "0") == "0" or not alike:
            print(f"{script}: {error}" if _meant(error) else traceback.format_exc(), file=sys.stderr)
        sys.exit(2)
    # an accelerator is the ranks' alone; without one, who started them plans while they begin
    elsewhere = default_device().type == "cpu" and (launched or "RANK" not in os.environ)
    if "RANK" not in os.environ:
        meanwhile = partial(write_plan, run, own) if elsewhere else lambda: None
        sys.exit(launch(script, run.world, run.threads, run.folder, bool(run.save_every), meanwhile))
    train(run, own, plans=not elsewhere)
    if dist.is_initialized():
        dist.destroy_process_group()


def planned(begin: Callable[[Run], Experiment], run: Run) -> Experiment:
    """The experiment of a command line, and a folder for it, in any process.

    Raises:
      ValueError: the experiment or a flag cannot stand, in one sentence; and what `begin` raises.
    """
    torch.manual_seed(run.seed)
    own = begin(run)
    if not isinstance(own, Experiment):
        raise ValueError(f"the script's begin returned a {type(own).__name__}; return fz.Experiment(step, params, ...)")
    if (own.batch is None) == (own.batches is None):
        raise ValueError("an Experiment has batch= or batches=, one of them; batch=lambda n: ... is the global batch")
    if own.step.grad.streams:
        raise ValueError("the step streams its micro-batches, and is called once an update; leave stream=True out")
    if own.evaluate is None and run.given("eval_every"):
        raise ValueError("--eval_every is given, and this script has nothing to evaluate; leave it out")
    if own.batch is not None:
        own.batch(0)  # what it refuses, it refuses here
    if odd := run.passed_over():
        what = f"--{odd[0]} is given, and the script's begin does not read run.{odd[0]}"
        raise ValueError(f"{what}; leave it out, or read it there")
    _folder(run)
    return own


def _folder(run: Run) -> None:
    saved = run.folder / "checkpoints"
    if run.resume == "never" and run.save_every and saved.is_dir() and any(saved.glob("[0-9]*")):
        raise ValueError(
            f"{saved} holds checkpoints of another run; go on with it by --resume=auto, or name another --out"
        )
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "metrics.jsonl").touch()
    except OSError as error:
        raise ValueError(f"--out={run.out} is no folder to write to ({error.strerror}); name another one") from None


def _meant(error: BaseException) -> bool:
    """Was this raised for a reader, by funczero or by the script's own files? A traceback tells more of others."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = Path(at.tb_frame.f_code.co_filename).resolve() if at is not None else Path()
    ours, scripts = Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve().parent
    installed = "site-packages" in where.parts
    return ours in where.parents or scripts in where.parents and not installed

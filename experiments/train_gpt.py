"""Does a GPT train under ZeRO from one command on a bare machine, and does the stage change anything but bytes and
memory?

Run:
    # two processes, ZeRO-3, Python's own library as text
    python experiments/train_gpt.py
    python experiments/train_gpt.py --stage=1 --accumulate=2 --data=my/notes,my/book.txt
    # four processes
    python experiments/train_gpt.py --mesh=node=2,local=2
    # processes that somebody else starts
    torchrun --nproc-per-node=4 experiments/train_gpt.py --stage=2
    # goes on where it was ended, on any number of processes and at any stage
    python experiments/train_gpt.py --save_every=100 --resume=auto
    # batch, precision, stage, optimizer and schedule as DeepSpeed's file says
    python experiments/train_gpt.py --deepspeed_config=ds_config.json
Expect:
    Two minutes on two cores. Held-out bits per byte fall from 8 to well below the entropy of single bytes (4.6), which
    no model without context can pass. The losses of all stages agree to float32 rounding. Bytes sent are the ZeRO
    paper's: stage 3 is 1.5 times stages 0 to 2.
Found:
    2 min 9 s on two cores, stage 3, two processes: held-out bits per byte 8.03 at the start, 2.55 after 200 updates,
    1.896 after 800; single bytes: 4.639. The 800 losses of stage 0 are those of stage 3, bit for bit. 4.59 MB a step
    are sent at stage 3, 3.41 at stage 0: two gathers of all blocks but the last, which stays open from the forward to
    the backward, and a scatter.
    --deepspeed_config, a tiny model on two processes: the losses of fp16 ZeRO-1 and of bf16 ZeRO-2 (4 micro-batches,
    clip, WarmupDecayLR) are unsharded torch's, bit for bit.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # before the slow imports: ctrl-c ends this process without a traceback

import json
import math
import os
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gpt
import torch
import torch.distributed as dist
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch.utils._pytree import tree_leaves, tree_map

import funczero as fz
from funczero import P
from funczero.world import environment

F = flags.FLAGS
flags.DEFINE_integer(
    "stage",
    3,
    "ZeRO stage: 0 shards nothing, 1 the optimizer's state, 2 also gradients, 3 also parameters.",
    lower_bound=0,
    upper_bound=3,
)
flags.DEFINE_string(
    "mesh",
    "",
    "Axes and sizes, outermost first, such as data=2 or node=2,local=2; -1: all that are left. Default: all processes"
    " on one axis.",
)
flags.DEFINE_integer(
    "nproc",
    None,
    "Processes to start when torchrun has not; default: for --mesh, or one an accelerator, or 2.",
    lower_bound=1,
)
flags.DEFINE_integer("threads", 1, "CPU threads of each process.", lower_bound=1, upper_bound=1024)
flags.DEFINE_string("policy", "float32", "Dtypes, one for all or params=float32,compute=bfloat16,accumulate=float32.")
flags.DEFINE_float(
    "scale_loss", 0.0, "First dynamic loss scale, for compute=float16, such as 65536; 0: none.", lower_bound=0.0
)
flags.DEFINE_integer("accumulate", 1, "Micro-batches an update, in each process.", lower_bound=1)
flags.DEFINE_integer(
    "micro_batch",
    None,
    "Windows of a micro-batch, in place of --accumulate: as many as --batch has are dealt over the processes, whatever"
    " their number.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "sums", "tree", ["tree", "exact", "backend"], "How gradients are added; exact: one result on any number of ranks."
)
flags.DEFINE_bool(
    "remat",
    False,
    "Save only the blocks' inputs and run each block again in the backward: less memory, a third more time.",
)
flags.DEFINE_integer("steps", 800, "Updates.", lower_bound=1)
flags.DEFINE_integer(
    "batch",
    16,
    "Windows of text in an update, over all processes; a multiple of processes x accumulate.",
    lower_bound=1,
)
flags.DEFINE_integer("length", 128, "Bytes in a window.", lower_bound=1)
flags.DEFINE_integer("layers", 4, "Blocks of the model.", lower_bound=1)
flags.DEFINE_integer("width", 128, "Features of a token; a multiple of 2 x heads.", lower_bound=2)
flags.DEFINE_integer("heads", 4, "Attention heads of a block.", lower_bound=1)
flags.DEFINE_float("lr", 3e-3, "Peak learning rate of AdamW; a half cosine takes it to a tenth.", lower_bound=0.0)
flags.DEFINE_integer(
    "warmup", 50, "Updates in which the learning rate rises from 0; at most --steps count.", lower_bound=0
)
flags.DEFINE_float(
    "weight_decay", 0.1, "Decay of the matrices an update, in units of the learning rate.", lower_bound=0.0
)
flags.DEFINE_float("clip", 1.0, "Largest norm of the mean gradient; 0: no clipping.", lower_bound=0.0)
flags.DEFINE_multi_string(
    "data",
    [],
    "Text files, or folders of .py and .txt files, separated by commas; may be repeated. Default: Python's own"
    " library.",
)
flags.DEFINE_integer("seed", 0, "Seed of the parameters, the batches and the sample.", lower_bound=0)
flags.DEFINE_integer(
    "eval_every",
    200,
    "Updates between two measurements of the held-out text; also at the start and the end.",
    lower_bound=1,
)
flags.DEFINE_integer("eval_batches", 8, "Held-out batches of --batch windows, always the same.", lower_bound=1)
flags.DEFINE_integer("sample", 300, "Bytes to sample at the end; 0: none.", lower_bound=0)
flags.DEFINE_integer(
    "save_every",
    0,
    "Updates between two checkpoints in --out/checkpoints, also at the end and on SIGTERM and SIGUSR1; 0: none.",
    lower_bound=0,
)
flags.DEFINE_string(
    "resume", "never", "auto: from the last checkpoint where there is one; a number: from that update's; never."
)
flags.DEFINE_integer("keep", 3, "Checkpoints that stay.", lower_bound=1)
flags.DEFINE_string(
    "deepspeed_config",
    "",
    "A ds_config.json that says batch, accumulation, precision, stage, clip, optimizer and schedule; it replaces the"
    " flags for them.",
)
flags.DEFINE_string(
    "out",
    "runs/train_gpt",
    "Folder for metrics.jsonl (a line an update), loss.png and what the processes write to stderr (rank0.log, ...).",
)


class Plan(NamedTuple):
    """What the flags ask for, built and checked before any process is started."""

    mesh: dict[str, int]
    params: dict
    loss_fn: partial
    step: fz.Step
    train: fz.data.Corpus
    held_out: fz.data.Corpus


def plan() -> Plan:
    """The step and the data of this command line, in any process. Raises ValueError or OSError with one sentence."""
    mesh = mesh_sizes()
    loss_fn = partial(gpt.loss_fn, heads=F.heads, remat=F.remat)
    step = (from_deepspeed if F.deepspeed_config else from_flags)(mesh, loss_fn)
    train, held_out = fz.data.load([path for text in F.data for path in text.split(",") if path])
    for corpus in (train, held_out):
        fz.data.batch(corpus, 0, 0, 1, F.length)  # too short a text says so here
    params, dtype = gpt.init(F.seed, gpt.Sizes(F.layers, F.width, F.heads)), step.grad.env.policy.params
    if F.resume not in ("auto", "never") and not F.resume.isdigit():
        raise ValueError(f"--resume={F.resume} is neither auto, never nor a number of updates; write --resume=auto")
    if (
        F.resume == "never"
        and F.save_every
        and (folder := Path(F.out, "checkpoints")).is_dir()
        and any(folder.glob("[0-9]*"))
    ):
        raise ValueError(
            f"{folder} holds checkpoints of another run; go on with it by --resume=auto, or name another --out"
        )
    try:
        Path(F.out).mkdir(parents=True, exist_ok=True)
        (Path(F.out) / "metrics.jsonl").touch()
    except OSError as error:
        raise ValueError(f"--out={F.out} is no folder to write to ({error.strerror}); name another one") from None
    return Plan(mesh, tree_map(lambda x: x.to(dtype), params), loss_fn, fz.donate(step), train, held_out)


def from_flags(mesh: dict[str, int], loss_fn: partial) -> fz.Step:
    """The step that the flags spell out."""
    micros = math.prod(mesh.values()) * F.accumulate
    if F.micro_batch is not None:
        if F["accumulate"].present:
            raise ValueError(f"--accumulate={F.accumulate} and --micro_batch say it twice; leave one of them out")
        if F.batch % F.micro_batch:
            raise ValueError(f"--batch={F.batch} windows are no multiple of --micro_batch={F.micro_batch}; write one")
        F.accumulate = math.ceil(F.batch / F.micro_batch / math.prod(mesh.values()))
    elif F.batch % micros:
        near = micros * math.ceil(F.batch / micros)
        raise ValueError(
            f"--batch={F.batch} windows do not divide into {micros} micro-batches (processes x"
            f" --accumulate={F.accumulate}); write --batch={near}"
        )
    axis = tuple(mesh)
    grad = fz.value_and_grad(loss_fn, batch=P(axis), units=("blocks",))
    scale = [fz.scale_loss(F.scale_loss)] if F.scale_loss else []
    clip = [fz.clip_by_global_norm(F.clip)] if F.clip else []
    lr = fz.schedules.warmup_cosine(F.lr, min(F.warmup, F.steps), F.steps, end=F.lr / 10)
    adamw = fz.adamw(lr, b1=0.9, b2=0.95, weight_decay=[("norm", 0.0), ("", F.weight_decay)])
    return fz.train_step(
        *fz.zero(grad, *scale, *clip, adamw, stage=F.stage, axis=axis, accumulate=F.accumulate),
        mesh=mesh,
        policy=F.policy,
        sums=F.sums,
    )


def from_deepspeed(mesh: dict[str, int], loss_fn: partial) -> fz.Step:
    """The step that --deepspeed_config describes; --stage, --batch and --accumulate become the file's."""
    said = [
        name
        for name in (
            "stage",
            "policy",
            "scale_loss",
            "accumulate",
            "micro_batch",
            "sums",
            "batch",
            "lr",
            "warmup",
            "weight_decay",
            "clip",
        )
        if F[name].present
    ]
    if said:
        raise ValueError(
            f"--{said[0]}={F[said[0]].value} and --deepspeed_config={F.deepspeed_config} say it twice; write it in the"
            " file alone"
        )
    chain, config = fz.from_deepspeed(
        F.deepspeed_config, loss_fn, world=math.prod(mesh.values()), axis=tuple(mesh), units=("blocks",)
    )
    F.stage, F.batch, F.accumulate = config.value("zero_optimization.stage"), config.triad.batch, config.triad.steps
    return fz.train_step(*chain, mesh=mesh, policy=config.policy)


def mesh_sizes() -> dict[str, int]:
    """--mesh as axis sizes, checked against the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else F.nproc
    pairs = [part.partition("=") for part in F.mesh.split(",") if part]
    if not all(
        name and size.removeprefix("-").isdigit() and (int(size) > 0 or int(size) == -1) for name, _, size in pairs
    ):
        raise ValueError(
            f"--mesh={F.mesh} does not name axes and their sizes; write --mesh=data=2 or --mesh=node=2,local=2"
        )
    mesh = {name: int(size) for name, _, size in pairs} or {"data": -1}
    free, sized = [name for name, n in mesh.items() if n == -1], math.prod(n for n in mesh.values() if n > 0)
    world = world or (max(torch.accelerator.device_count() or 2, sized) if free else sized)
    if len(mesh) < len(pairs) or len(free) > 1 or (world % sized if free else world != sized):
        raise ValueError(
            f"--mesh={F.mesh} does not lay out {world} processes; name each axis once, one of size -1 at most, and"
            " sizes that multiply to them"
        )
    return mesh | {name: world // sized for name in free}


def launch(world: int) -> int:
    """Run this command line in `world` processes, as torchrun would; when one ends badly all end, and its log is shown.
    Returns the exit status.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": F.threads,
    }
    logs = [Path(F.out) / f"rank{rank}.log" for rank in range(world)]
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the processes inherit it: ctrl-c reaches this one alone, and this one ends the others
    ranks = []
    for rank, log in enumerate(logs):
        env = os.environ | {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        with log.open("wb") as stderr:
            ranks.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=env, stderr=stderr))
    passed_on = lambda number, _: [
        p.send_signal(number) for p in ranks if p.poll() is None
    ]  # each saves at its next step boundary, and ends
    signal.signal(signal.SIGTERM, passed_on if F.save_every else lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGUSR1, passed_on if F.save_every else signal.SIG_DFL)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))
    try:
        while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks):
            time.sleep(0.05)
        bad = [rank for rank, p in enumerate(ranks) if p.poll()]
    finally:
        for p in ranks:
            p.kill()
            p.wait()
        Console().show_cursor()  # a bar that was killed leaves it hidden
    if not bad:
        return 0
    first = min(bad, key=lambda rank: logs[rank].stat().st_mtime)  # the others fail because the first one did
    status = ranks[first].returncode
    print(
        f"{logs[first].read_text(errors='replace')}train_gpt: process {first} of {world} ended with status {status}",
        file=sys.stderr,
    )
    return status if status > 0 else 128 - status


class Report:
    """What rank 0 tells: metrics.jsonl, one bar on a terminal or a plain line now and then elsewhere, and loss.png.

    The other ranks are silent.
    """

    def __init__(self, speaks: bool, start: int) -> None:
        self.speaks, self.records, self.rate, self.then = speaks, [], 0.0, time.perf_counter()
        path = Path(F.out) / "metrics.jsonl"
        if start and speaks:  # what came after the checkpoint is done again
            told = map(json.loads, path.read_text().splitlines())
            self.records = [r for r in told if r["step"] < start + ("loss" in r)]
        self.file = path.open("w") if speaks else None
        if self.file:
            self.file.writelines(json.dumps(r) + "\n" for r in self.records)
        console = Console(quiet=not speaks, soft_wrap=True, highlight=False, markup=False)
        self.say = console.print  # a line above the bar
        whole = Column(no_wrap=True)  # on a narrow terminal the numbers take a second line, the rest stays
        left, right = (MofNCompleteColumn(table_column=whole), TimeRemainingColumn(table_column=whole)), TextColumn(
            "{task.description}", table_column=Column()
        )
        self.bar = Progress(BarColumn(20), *left, right, console=console, disable=not (speaks and console.is_terminal))
        self.task = self.bar.add_task("", total=F.steps, completed=start)

    def write(self, **record: float) -> None:
        """One line of metrics.jsonl."""
        if self.file:
            self.records.append(record)
            print(json.dumps(record), file=self.file, flush=True)

    def update(self, number: int, m: fz.Metrics, sent: int) -> None:
        """An update has been made."""
        now = time.perf_counter()
        rate, self.then = F.batch * F.length / (now - self.then), now
        self.rate = rate if number < 3 else 0.9 * self.rate + 0.1 * rate
        loss = m.loss.item()
        bits = loss / math.log(2)
        scalars = {name: getattr(m, name).item() for name in ("lr", "grad_norm", "ok", "scale")}
        self.write(step=number, loss=loss, bits_per_byte=bits, tokens_per_second=rate, bytes_sent=sent, **scalars)
        text = (
            f"loss {loss:.3f}  bits/byte {bits:.3f}  {self.rate:,.0f} tokens/s  sent {sent / 1e6:.2f} MB/step  lr"
            f" {m.lr.item():.1e}{'' if m.ok else '  skipped'}"
        )
        self.bar.update(self.task, completed=number, description=text)
        if self.bar.disable and (number == 1 or number % max(1, F.steps // 20) == 0):
            self.say(f"step {number:5d}  {text}")

    def plot(self, unigram: float) -> None:
        """Bits per byte over updates, of the training batches and of the held-out text."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return self.say("no loss.png: matplotlib is not installed; pip install matplotlib")
        axes = Figure(layout="constrained").add_subplot(
            xlabel="updates", ylabel="bits per byte", title=f"ZeRO-{F.stage}, seed {F.seed}"
        )
        for name, style, label in (
            ("bits_per_byte", "-", "training batch"),
            ("held_out_bits_per_byte", "o-", "held-out text"),
        ):
            points = [(r["step"], r[name]) for r in self.records if name in r]
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
        axes.axhline(unigram, linestyle="--", color="gray", label="entropy of single bytes, held-out text")
        axes.legend()
        axes.figure.savefig(Path(F.out) / "loss.png", dpi=120)


def train(own: Plan) -> None:
    """One rank's run."""
    torch.set_num_threads(F.threads)
    step, world = own.step, fz.init_distributed()
    checkpoints = fz.Checkpointer(Path(F.out, "checkpoints"), keep=F.keep, step=step, config=F.flag_values_dict())
    state = begin(own, checkpoints)
    start = int(state.step)
    report, unigram = Report(world.rank == 0, start), fz.data.unigram_entropy(own.held_out)
    evaluate, count = step.eval(own.loss_fn), sum(x.numel() for x in tree_leaves(own.params))
    report.say(
        f"{step}\n{count:,} parameters, {len(own.train):,} bytes to train on, {len(own.held_out):,} held out; results"
        f" in {F.out}"
    )

    def measure(number: int) -> None:
        batches = fz.data.sample_batches(own.held_out, F.eval_batches, F.batch, F.length)
        bits = (
            sum(evaluate(state, step.local_rows(batch, F.micro_batch)).loss.item() for batch in batches)
            / F.eval_batches
            / math.log(2)
        )
        report.write(step=number, held_out_bits_per_byte=bits, unigram_bits_per_byte=unigram)
        report.say(f"step {number:5d}  held-out bits/byte {bits:.4f}  (single bytes: {unigram:.4f})")
        report.then = time.perf_counter()  # this was no training

    with report.bar, fz.Notice() if F.save_every else nullcontext() as notice:
        for number in range(start, F.steps):
            if number % F.eval_every == 0:
                measure(number)
            with fz.count_bytes(step) as sent:
                batch = fz.data.batch(own.train, F.seed, number, F.batch, F.length)
                state, metrics = step(state, step.local_rows(batch, F.micro_batch))
            report.update(number + 1, metrics, sum(sent.values()))
            if notice:
                checkpoints.poll()
                told = notice.given()
                if told or (number + 1) % F.save_every == 0 or number + 1 == F.steps:
                    checkpoints.save(state, number + 1, metrics={"loss": metrics.loss.item()})
                if told:
                    checkpoints.close()
                    report.say(
                        f"stopped by {notice.name or 'a signal to another process'} after update {number + 1};"
                        " --resume=auto goes on from there"
                    )
                    return leave()
        measure(F.steps)
    checkpoints.close()
    whole = step.params(state)
    if report.speaks:
        report.plot(unigram)
        if F.sample:
            generator = torch.Generator().manual_seed(F.seed)
            report.say(gpt.sample(whole, F.heads, b"def ", F.sample, F.length, 0.8, generator).decode(errors="replace"))
    leave()


def begin(own: Plan, checkpoints: fz.Checkpointer) -> fz.TrainState:
    """The state to start from; a fresh one in place of a checkpoint only by --resume=auto, which says so."""
    if F.resume == "auto" and not checkpoints.names():
        if fz.init_distributed().rank == 0:
            print(
                f"train_gpt: {checkpoints.directory} holds no checkpoint; this run starts at update 0", file=sys.stderr
            )
    elif F.resume != "never":
        return checkpoints.restore("latest" if F.resume == "auto" else F.resume, like=(own.step, own.params)).state
    return own.step.init(own.params)


def leave() -> None:
    """The end of a process that is in step with the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: list[str]) -> None:
    """Check the flags, then start the processes, or be one of them."""
    environment.adopt()  # SLURM's and MPI's words for rank and world, in torchrun's
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} is not a flag; write --flag=value, or --help for the list")
        own = plan()
    except (ValueError, OSError, fz.ChainError) as error:  # the same in every process
        if os.environ.get("RANK", "0") == "0":
            print(f"train_gpt: {error}", file=sys.stderr)
        sys.exit(2)
    if "RANK" not in os.environ:
        sys.exit(launch(math.prod(own.mesh.values())))
    train(own)


if __name__ == "__main__":
    app.run(main)

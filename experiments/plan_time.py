"""Is the time of an update that `fz.plan` predicts the one that is measured, over this machine and over a slow link?

Run:
    python experiments/plan_time.py                             # two gloo ranks of one thread: tiny, small and medium
    python experiments/plan_time.py --sizes=small --stages=1,3 --rounds=3
    python experiments/plan_time.py --rates=100,1000            # as root; two nodes of two ranks, joined by that link

How: the ranks calibrate a machine and a link, all at once, so that what they take from each other is in the numbers: a
product of matrices, a copy and a tiny model without a chain; a short message and a long one over every mesh axis.
Predicted is `fz.plan(step, params, batch, link=..., machine=...)`, which knows nothing else; measured is the median
update of the donated step. Rounds visit every step once, so that noise hits all alike.

Expect:
    Predicted within 25 % of measured at every stage, where arithmetic or the link is what takes time; a tiny step is
    Python's own work, of which the model has one number an operation.

Found (quiet, two cores, predicted over measured at stages 0, 1, 2, 3):
    --sizes=tiny,small,medium --rounds=2: medium 0.98, 0.95, 0.94, 0.90; small 0.88, 0.90, 0.83, 0.79; tiny 0.51, 0.54,
    0.60, 0.73, another day 0.95, 0.72, 0.68, 0.85: waking gloo's threads is most of a tiny step, and no two runs agree.
    --sizes=small --rates=100,1000 --stages=0,1,3 --rounds=2 (and ZeRO++): 100 Mbit/s 0.76, 0.76, 0.79, 1.05; 1 Gbit/s
    0.83, 0.72, 0.82, 0.81. Stage 1 at 1 Gbit/s is out of the bound: four ranks share two cores there with the threads
    that send, which the model does not know.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_models
import torch
import two_nodes
from absl import app, flags
from rich.console import Console
from rich.table import Table

import funczero as fz
from funczero import P
from funczero.comm.launch import launch_gather, wait
from funczero.planning.model import Link, Machine
from funczero.testing import WorkerPool

F = flags.FLAGS
flags.DEFINE_list("sizes", list(bench_models.SIZES), "Which of tiny, small, medium.")
flags.DEFINE_list("stages", ["0", "1", "2", "3"], "ZeRO stages; over a slow link also zeropp.")
flags.DEFINE_integer("rounds", 7, "Visits of every step.", lower_bound=1)
flags.DEFINE_integer("updates", 3, "Updates of a visit.", lower_bound=1)
flags.DEFINE_list("rates", [], "Million bits a second of the link between two nodes; none: one machine.")
flags.DEFINE_string("out", "runs/plan_time", "Folder for found.json and what ranks write to stderr.")


# --- what is measured of the machine ----------------------------------------------------------------------------------
def seconds(fn: Callable[[], Any], times: int) -> float:
    """The median of one call."""
    fn()
    took = []
    for _ in range(times):
        begun = time.perf_counter()
        fn()
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def machine() -> Machine:
    """What a rank computes with, while the others compute, too."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    large, to = torch.randn(1 << 23), torch.empty(1 << 23)
    flops, bandwidth = 2 * 512**3 / seconds(lambda: a @ b, 20), 2 * large.nbytes / seconds(lambda: to.copy_(large), 9)
    return Machine(flops, bandwidth, operation())


def operation() -> float:
    """Seconds an operation of a forward and backward in which every one is small, Python's own work included."""
    s = bench_models.SIZES["tiny"]
    params, tokens = bench_models.init_params(s), torch.zeros(1, s.T, dtype=torch.int64)
    leaves = [x.requires_grad_() for x in fz.tree.tensors(params)]
    run = functools.partial(fz.layers, functools.partial(bench_models.block, heads=s.heads), params["blocks"])
    once = lambda: bench_models.summed_loss(params, run, {"x": tokens, "y": tokens})
    alone = fz.plan(step_of("tiny", "0", {"data": 1}), params, {"x": tokens, "y": tokens})
    operations = sum(v.operations for v in alone.verbs if v.phase in ("forward", "backward"))
    return seconds(lambda: torch.autograd.grad(once(), leaves, allow_unused=True), 20) / operations


def links(mesh: Any) -> dict[str, Link]:
    """A short message and a long one over every axis, all ranks at once."""
    found = {}
    for axis, place in mesh.axes.items():
        if place.size > 1:
            sent = lambda n, axis=axis: wait(launch_gather(torch.zeros(n), axis, mesh))
            latency, n = seconds(functools.partial(sent, 16), 30), 1 << 19
            long = seconds(functools.partial(sent, n), 5)
            found[axis] = Link(latency, 4 * n * (place.size - 1) / max(long - latency, 1e-9))
    return found


# --- a rank -----------------------------------------------------------------------------------------------------------
def step_of(size: str, name: str, mesh: dict[str, int]) -> Any:
    """A step of ours at a stage, or ZeRO++."""
    s, axes = bench_models.SIZES[size], tuple(mesh)

    def loss_fn(params: dict, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        run = functools.partial(fz.layers, functools.partial(bench_models.block, heads=s.heads), params["blocks"])
        return bench_models.summed_loss(params, run, batch), torch.tensor(float(batch["y"].numel()))

    grad, tx = fz.value_and_grad(loss_fn, batch=P(axes), units=("blocks",)), fz.adamw(3e-4)
    if name == "zeropp":
        return fz.train_step(*fz.zeropp(grad, tx), mesh=mesh, check=0)
    over = axes if len(axes) > 1 else axes[0]
    return fz.train_step(*fz.zero(grad, tx, stage=int(name), axis=over), mesh=mesh, check=0)


class Rank:
    """One rank, which holds every step."""

    def __init__(self, mesh: dict[str, int], sizes: list[str], names: list[str]) -> None:
        torch.set_num_threads(1)
        self.mesh, self.held = mesh, {}
        for size in sizes:
            s = bench_models.SIZES[size]
            params = bench_models.init_params(s)
            tokens = torch.randint(s.vocab, (max(s.B, 4), s.T), generator=torch.Generator().manual_seed(1))
            batch = {"x": tokens, "y": tokens}
            for name in names:
                step = fz.donate(step_of(size, name, mesh))
                self.held[size, name] = [step, step.init(params), step.local_rows(batch), params, batch]

    def calibrate(self) -> dict[str, Any]:
        """As numbers that go through JSON."""
        step = next(iter(self.held.values()))[0]
        return {"machine": list(machine()), "links": {a: list(x) for a, x in links(step.live_mesh).items()}}

    def visit(self, size: str, name: str, updates: int) -> float:
        """Median seconds of an update."""
        held = self.held[size, name]
        step, _, rows, *_ = held

        def once() -> None:
            held[1], _ = step(held[1], rows)

        return seconds(once, updates)

    def plan(self, size: str, name: str, found: dict[str, Any]) -> float:
        """Predicted seconds of an update."""
        step, _, _, params, batch = self.held[size, name]
        link = {axis: Link(*x) for axis, x in found["links"].items()}
        predicted = fz.plan(step, params, batch, self.mesh, link, Machine(*found["machine"])).seconds
        assert predicted is not None
        return predicted.update


HERE: list[Rank] = []  # of a worker process


def build(mesh: dict[str, int], sizes: list[str], names: list[str]) -> None:
    """In a worker."""
    HERE[:] = [Rank(mesh, sizes, names)]


def do(what: str, *args: Any) -> Any:
    """In a worker."""
    return getattr(HERE[0], what)(*args)


def rank() -> None:
    """In a rank of a node."""
    fz.init_distributed()
    mine = Rank({"node": 2, "local": 2}, F.sizes, names_of(F.rates))
    for question, answers in two_nodes.questions():
        print(json.dumps(getattr(mine, question["do"])(*question["args"])), file=answers)
    os._exit(0)


# --- the script that asks ---------------------------------------------------------------------------------------------
def names_of(rates: list[str]) -> list[str]:
    """What is run."""
    return list(dict.fromkeys([*F.stages, "zeropp"])) if rates else F.stages


def compared(ask: Callable[..., list[Any]], names: list[str], where: str) -> list[dict[str, Any]]:
    """Calibrates, measures, plans."""
    numbers = ask("calibrate")
    mean = lambda rows: [statistics.mean(x) for x in zip(*rows, strict=True)]
    found = {
        "machine": mean([n["machine"] for n in numbers]),
        "links": {axis: mean([n["links"][axis] for n in numbers]) for axis in numbers[0]["links"]},
    }
    pairs = [(size, name) for size in F.sizes for name in names]
    took: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for _ in range(F.rounds):
        for pair in pairs:
            took[pair].append(max(ask("visit", *pair, F.updates)))
    rows = []
    for pair in pairs:
        predicted, measured = ask("plan", *pair, found)[0], statistics.median(took[pair])
        rows.append({"where": where, "size": pair[0], "chain": pair[1], "predicted": predicted, "measured": measured})
    return [row | {"calibrated": found} for row in rows]


def table(rows: list[dict[str, Any]], console: Console) -> None:
    """One line a step."""
    out = Table("link", "size", "chain", "predicted, ms", "measured, ms", "predicted / measured")
    for row in rows:
        a, b = 1e3 * row["predicted"], 1e3 * row["measured"]
        out.add_row(row["where"], row["size"], row["chain"], f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}")
    console.print(out)


def main(argv: list[str]) -> None:
    """On one machine, or on two nodes of it."""
    if "RANK" in os.environ:
        return rank()
    odd = next((x for x in F.sizes if x not in bench_models.SIZES), argv[1] if len(argv) > 1 else None)
    wrong = f"{odd!r} is no size and no flag; write --sizes=small,medium" if odd else ""
    wrong = wrong or (two_nodes.missing() if F.rates else "")
    if wrong:
        print(f"plan_time: {wrong}", file=sys.stderr)
        sys.exit(2)
    out, console, rows = Path(F.out), Console(soft_wrap=True, highlight=False), []
    out.mkdir(parents=True, exist_ok=True)
    if not F.rates:
        with WorkerPool(2, runs=10**6) as pool:  # they hold what is measured
            pool.run(build, {"data": 2}, F.sizes, names_of([]), timeout=600.0)
            rows = compared(lambda *words: pool.run(do, *words, timeout=600.0), names_of([]), "one machine")
    else:
        with two_nodes.two_nodes() as nodes:
            ranks = two_nodes.Ranks(nodes, 2, [sys.executable, *sys.orig_argv[1:]], out)
            ask = lambda what, *args: ranks.ask({"do": what, "args": args})
            for rate in F.rates:
                two_nodes.limit(nodes, int(rate))
                rows += compared(ask, names_of(F.rates), f"{rate} Mbit/s")
    (out / "found.json").write_text(json.dumps(rows))
    table(rows, console)


if __name__ == "__main__":
    app.run(main)

"""What does a step that can be differentiated buy: parameters that adapt (MAML), and a learning rate that is learned?

Run:
    python experiments/meta.py                                   # both, ten minutes on two cores
    python experiments/meta.py --parts=maml --meta_updates=200
    python experiments/meta.py --parts=schedule --stage=1 --processes=1

How: two gloo processes, ZeRO-3; the inner loop is `fz.differentiable(step)`, the outer gradient `torch.func.grad`.
`maml`: sines of an amplitude and a phase of their own, ten points each, as Finn et al. (arXiv 1703.03400) have it. One
inner update of plain gradient descent; tasks are batched by vmap, so a task costs no collective of its own. Against it
stand the same network trained on all tasks at once, and a fresh one, each adapted by the same step.
`schedule`: a GPT over the bytes of Python's own library is trained for --unroll updates of AdamW, and the learning rate
of every update is a leaf that is moved along the derivative of the held-out loss (Maclaurin et al., arXiv 1502.03492),
on other first parameters and other bytes at every meta-update. It is judged on parameters and bytes that it has never
seen, against the best constant rate of a grid and the best warmup and cosine of a grid.

Expect:
    maml: after one update far below both others; joint training does not adapt. schedule: at least as good as the best
    of the hand-made ones, with a rise at the start and a fall at the end that nobody asked for.

Found (two shared busy cores, torch 2.13):
    sines, squared error after    0      1      5      10     seconds of training
    fresh                         4.066  4.048  3.993  3.943  0
    all tasks at once             2.873  1.999  1.809  1.770  35
    MAML                          2.893  0.796  0.546  0.489  204
    GPT, held-out loss                  mean    spread over five seeds
    best constant (0.01)                2.7983  0.1409
    best warmup and cosine (0.03, 1)    2.8231  0.1710
    learned                             2.7390  0.1223     10.8 s a meta-update of 40 updates
    The learned rates are the best, by less than seeds differ, and not of the shape that was expected: high in the first
    five updates, low until the fifteenth, high and ragged after that, with no fall at the end.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gpt
import torch
from absl import app, flags
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import grad, vmap

import funczero as fz
from funczero.testing import WorkerPool

F = flags.FLAGS
flags.DEFINE_list("parts", ["maml", "schedule"], "Which of maml, schedule.")
flags.DEFINE_integer("processes", 2, "Ranks.", lower_bound=1)
flags.DEFINE_integer("stage", 3, "ZeRO stage of the inner step.", lower_bound=0, upper_bound=3)
flags.DEFINE_integer("meta_updates", 2000, "Of MAML.", lower_bound=1)
flags.DEFINE_integer("tasks", 25, "Tasks of a meta-update.", lower_bound=1)
flags.DEFINE_integer("unroll", 40, "Updates of the GPT.", lower_bound=2)
flags.DEFINE_integer("learn", 60, "Meta-updates of the schedule.", lower_bound=1)
flags.DEFINE_string("out", "runs/meta", "Folder of the plots.")

POINTS, INNER, UPDATES = 10, 0.01, (0, 1, 5, 10)
SIZES, ROWS, LENGTH = gpt.Sizes(2, 32, 2), 8, 32


class Adam:
    """Adam on a tree of this rank's parts, which are values of their own."""

    def __init__(self, like: dict[str, Tensor], lr: float) -> None:
        self.lr, self.n = lr, 0
        self.m, self.v = ({k: torch.zeros_like(x) for k, x in like.items()} for _ in range(2))

    def moved(self, p: dict[str, Tensor], g: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next values."""
        self.n += 1
        self.m = {k: 0.9 * self.m[k] + 0.1 * g[k] for k in p}
        self.v = {k: 0.999 * self.v[k] + 0.001 * g[k] ** 2 for k in p}
        scale = {k: (self.v[k] / (1 - 0.999**self.n)).sqrt() + 1e-8 for k in p}
        return {k: p[k] - self.lr * self.m[k] / (1 - 0.9**self.n) / scale[k] for k in p}


# --- MAML -------------------------------------------------------------------------------------------------------------
def sines(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Tasks: 2 * POINTS points of n sines, [n, 2 * POINTS, 1]."""
    draw = lambda *shape: torch.rand(shape, generator=generator)
    amplitude, phase, x = 0.1 + 4.9 * draw(n, 1, 1), torch.pi * draw(n, 1, 1), 10 * draw(n, 2 * POINTS, 1) - 5
    return {"x": x, "y": amplitude * torch.sin(x + phase)}


def network(seed: int) -> dict[str, Tensor]:
    """Two hidden layers of 40."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"w1": (1, 40), "w2": (40, 40), "w3": (40, 1)}
    weights = {k: torch.randn(s, generator=g) * 0.1 for k, s in sizes.items()}
    return weights | {"b1": torch.zeros(40), "b2": torch.zeros(40), "b3": torch.zeros(1)}


def squared(p: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums over points."""
    h = torch.relu(b["x"] @ p["w1"] + p["b1"])
    out = torch.relu(h @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]
    return ((out - b["y"]) ** 2).sum(), b["y"].new_tensor(float(len(b["y"])))


def maml(stage: int, meta_updates: int, tasks: int) -> list[tuple[str, list[float], float]]:
    """By method: the loss on new points of 200 new tasks after UPDATES inner updates, and seconds of training."""
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(squared, batch=fz.P("data")), fz.sgd(INNER), stage=stage), mesh={"data": -1}
    )
    state = step.init(network(0))
    loss, smooth = fz.sharded_loss(step, squared, state), fz.differentiable(step)
    rank, size = step.live_mesh.rank(("data",))
    mine = lambda x: x[:, rank::size]  # this rank's points of every task
    halves = lambda b: ({k: mine(x[:, :POINTS]) for k, x in b.items()}, {k: mine(x[:, POINTS:]) for k, x in b.items()})

    def adapted(p: dict[str, Tensor], support: Any, query: Any, updates: int) -> Tensor:
        end, _ = fz.unroll(smooth, fz.with_parts(state, p), [support] * updates)
        return loss(fz.parts(end), query)

    def over_tasks(p: dict[str, Tensor], b: dict[str, Tensor], updates: int) -> Tensor:
        each = lambda support, query: adapted(p, support, query, updates)
        return vmap(each)(*halves(b)).mean()

    def trained(inner: int) -> tuple[dict[str, Tensor], float]:
        g, p = torch.Generator().manual_seed(1), fz.parts(state)
        adam, begun = Adam(p, 1e-3), time.monotonic()
        for _ in range(meta_updates):
            p = adam.moved(p, grad(over_tasks)(p, sines(tasks, g), inner))
        return p, time.monotonic() - begun

    test, found = sines(200, torch.Generator().manual_seed(2)), []
    for name, inner in (("fresh", None), ("all tasks at once", 0), ("MAML", 1)):
        p, seconds = (fz.parts(state), 0.0) if inner is None else trained(inner)
        found.append((name, [over_tasks(p, test, n).item() for n in UPDATES], seconds))
    return found


# --- a learned schedule -----------------------------------------------------------------------------------------------
def nll(p: dict, b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of a GPT's next bytes."""
    return gpt.loss_fn(p, b, SIZES.heads)


def schedule(stage: int, unroll: int, learn: int) -> tuple[list[tuple[str, float, float]], list[list[float]], float]:
    """(method, held-out loss, its spread over seeds), the learned rates as they came, seconds a meta-update."""
    train, held_out = fz.data.load()
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(nll, batch=fz.P("data")), fz.clip_by_global_norm(1.0), fz.adamw(1e-3), stage=stage),
        mesh={"data": -1},
    )
    smooth = fz.differentiable(step)
    rows = lambda corpus, seed, n: step.local_rows(fz.data.batch(corpus, seed, n, ROWS, LENGTH))
    fresh = lambda seed: step.init(gpt.init(seed, SIZES))
    loss = fz.sharded_loss(step, nll, fresh(0))

    def one(s: Any, x: Any) -> Any:
        own = s.chain["adamw"]
        return smooth(step.with_state(s, own._replace(rates={**own.rates, "lr": x[0]})), x[1])

    def held(rates: Tensor, seed: int, remat: int | None = 10, corpus: Any = train) -> Tensor:
        xs = [(r, rows(train, seed, i)) for i, r in enumerate(rates.unbind())]
        end, _ = fz.unroll(one, fresh(seed), xs, remat=remat)
        return sum((loss(fz.parts(end), rows(corpus, seed, unroll + i)) for i in range(8)), torch.zeros(())) / 8

    def judged(rates: Tensor) -> list[float]:
        return [held(rates, seed, None, held_out).item() for seed in range(1000, 1005)]

    logs, history, begun = {"": torch.full((unroll,), 3e-3, dtype=torch.float64).log()}, [], time.monotonic()
    adam = Adam(logs, 0.1)
    for seed in range(learn):
        history.append(logs[""].exp().tolist())
        g = grad(lambda x, seed=seed: held(x.exp(), seed))(logs[""])
        logs = adam.moved(logs, {"": g})
    seconds = (time.monotonic() - begun) / learn
    history.append(logs[""].exp().tolist())
    at = torch.arange(unroll, dtype=torch.float64)
    constant = {r: torch.full((unroll,), r, dtype=torch.float64) for r in (1e-3, 3e-3, 1e-2, 3e-2)}
    rise = lambda r, w: r * torch.minimum((at + 1) / w, (1 + (torch.pi * at / unroll).cos()) / 2)
    cosine = {(r, w): rise(r, w) for r in (3e-3, 1e-2, 3e-2) for w in (1, unroll // 10, unroll // 4)}
    found = []
    for name, grid in (("best constant", constant), ("best warmup and cosine", cosine)):
        losses = {k: judged(r) for k, r in grid.items()}
        best = min(losses, key=lambda k: sum(losses[k]))
        found.append((f"{name} {best}", losses[best]))
    found.append(("learned", judged(logs[""].exp())))
    spread = lambda xs: (sum(xs) / len(xs), torch.tensor(xs).std().item())
    return [(name, *spread(xs)) for name, xs in found], history, seconds


# --- what is shown ----------------------------------------------------------------------------------------------------
def plot(path: Path, lines: dict[str, list[float]], x: str, y: str, log: bool = False) -> str:
    """Lines."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {path}: matplotlib is not installed; pip install matplotlib"
    axes = Figure(figsize=(6, 4), layout="constrained").add_subplot(
        xlabel=x, ylabel=y, yscale="log" if log else "linear"
    )
    for name, values in lines.items():
        axes.plot(values, label=name)
    axes.legend()
    axes.figure.savefig(path, dpi=120)
    return f"{path} has the plot"


def main(argv: list[str]) -> None:
    """Both parts in worlds of their own."""
    odd = next((x for x in F.parts if x not in ("maml", "schedule")), argv[1] if len(argv) > 1 else None)
    if odd is not None:
        print(f"meta: {odd!r} is no part and no flag; write --parts=maml,schedule", file=sys.stderr)
        sys.exit(2)
    out, console = Path(F.out), Console(soft_wrap=True, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    with WorkerPool(F.processes) as pool:
        if "maml" in F.parts:
            found = pool.run(partial(maml, F.stage, F.meta_updates, F.tasks), timeout=3600.0)[0]
            table = Table("sines, squared error after", *map(str, UPDATES), "seconds of training")
            for name, losses, seconds in found:
                table.add_row(name, *(f"{x:.3f}" for x in losses), f"{seconds:.0f}")
            console.print(table)
            lines = {name: losses for name, losses, _ in found}
            console.print(plot(out / "maml.png", lines, f"inner updates {UPDATES}", "squared error", log=True))
        if "schedule" in F.parts:
            found, history, seconds = pool.run(partial(schedule, F.stage, F.unroll, F.learn), timeout=3600.0)[0]
            table = Table("GPT, held-out loss", "mean", "spread over seeds")
            for name, mean, spread in found:
                table.add_row(name, f"{mean:.4f}", f"{spread:.4f}")
            console.print(table)
            console.print(f"{seconds:.1f} s a meta-update; learned: {[f'{x:.4f}' for x in history[-1][::5]]}")
            lines = {f"after {i}": history[i] for i in (0, len(history) // 4, len(history) - 1)}
            console.print(plot(out / "schedule.png", lines, "update", "learning rate", log=True))


if __name__ == "__main__":
    app.run(main)

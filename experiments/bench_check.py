"""What does `train_step(..., check=)` cost while it looks, and how soon does it tell?

Run:
    python experiments/bench_check.py
    python experiments/bench_check.py --stage=1 --rounds=40

How: two gloo processes, one thread each, hold the same step twice: check=0 and check=True. A round visits both for a
few steps, in turns, and the ratio is taken within a round; `cpu` is the process's, the comparing thread included. Then
rank 1 evaluates once more than rank 0, and the time to each process's end is taken.

Expect:
    Less than 1 % of a step of a tiny model (2 ms): a tuple a collective, and a look twice a second. Told within 3
    periods of 0.5 s, ended one second later.

Found:
    Not taken yet on a quiet machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import timeit

import torch
import torch.distributed as dist
import torch.nn.functional as F
from absl import app, flags

import funczero as fz
from funczero.world.ledger import Ledger

flags.DEFINE_integer("stage", 3, "ZeRO stage.")
flags.DEFINE_integer("rounds", 60, "Visits of each.")
flags.DEFINE_integer("steps", 50, "Steps of a visit.")
flags.DEFINE_integer("width", 64, "Width of the model: 4 blocks of 2 width**2 parameters.")
flags.DEFINE_string("worker", "", "Internal: where the processes meet.")


def make(stage: int, width: int, check: int | bool) -> fz.Step:
    """Four blocks under one stage."""

    def loss_fn(params: dict, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        x = fz.layers(lambda p, x: x + torch.tanh(x @ p["a"]) @ p["b"], params["blocks"], batch["x"])
        return F.mse_loss(x, batch["x"].roll(1, 0), reduction="sum"), torch.tensor(float(len(x)))

    grad = fz.value_and_grad(loss_fn, batch=fz.P("data"), units=("blocks",))
    return fz.donate(
        fz.train_step(
            *fz.zero(grad, fz.clip_by_global_norm(1.0), fz.adamw(1e-3), stage=stage), mesh={"data": -1}, check=check
        )
    )


def measure(stage: int, rounds: int, steps: int, width: int) -> None:
    """The table on rank 0, then one evaluation too many on rank 1."""
    torch.manual_seed(0)
    params = {
        "blocks": [{"a": torch.randn(width, width) / width, "b": torch.randn(width, width) / width} for _ in range(4)]
    }
    runs = {}
    for name, check in (("off", 0), ("on", True)):
        runs[name] = [step := make(stage, width, check), step.init(params)]
    rows = runs["off"][0].local_rows({"x": torch.randn(16, width)})
    costs: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    for r in range(rounds + 1):
        for name in ("off", "on") if r % 2 else ("on", "off"):
            step, state = runs[name]
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                state, _ = step(state, rows)
            runs[name][1] = state
            if r:  # the first visit does not count
                costs[name].append(
                    ((time.perf_counter() - wall) * 1e3 / steps, (time.process_time() - cpu) * 1e3 / steps)
                )
    step, state = runs["on"]
    if dist.get_rank() == 0:
        off, on = torch.tensor(costs["off"]), torch.tensor(costs["on"])
        ratio = (on / off).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
        for i, what in enumerate(("wall", "cpu")):
            print(
                f"{what:>5} ms a step: off {off[:, i].median():.3f}, on {on[:, i].median():.3f}, on / off"
                f" {ratio[1, i]:.3f} ({ratio[0, i]:.3f} to {ratio[2, i]:.3f})"
            )
        count, ledger = step.running().env.mesh.ledger.watch.log.count, Ledger()
        note = (
            min(timeit.repeat(lambda: ledger.note("all_gather", "data", "float32", 1), number=100_000, repeat=5))
            / 100_000
        )
        print(f"one entry: {note * 1e6:.2f} us; entries so far: {count}", flush=True)
    dist.barrier()
    print(f"apart {time.time()}", flush=True)
    if dist.get_rank() == 1:
        step.eval(lambda params, batch: (batch["x"].sum() * 0, torch.ones(())))(state, rows)
    step(state, rows)


def main(_: list[str]) -> None:
    o = flags.FLAGS
    if o.worker:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{o.worker}", rank=int(os.environ["RANK"]), world_size=2)
        return measure(o.stage, o.rounds, o.steps, o.width)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, f"--worker={folder}/meet"]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, "RANK": str(r), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in range(2)
        ]
        ends = {}
        while len(ends) < 2:
            ends |= {r: time.time() for r, p in enumerate(ranks) if r not in ends and p.poll() is not None}
            time.sleep(0.02)
        for r, p in enumerate(ranks):
            out, err = p.communicate()
            apart = float(out.split("apart ")[1].split()[0])
            print(
                out.split("apart")[0],
                f"rank {r}: code {p.returncode}, ended after {ends[r] - apart:.2f} s: {err.strip()[-600:]}",
                sep="",
            )


if __name__ == "__main__":
    app.run(main)

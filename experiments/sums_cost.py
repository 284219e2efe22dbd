"""What do the one tree, and sums of integers, cost against the backend's own sums: step time, CPU time, bytes, memory?

Run:
    python experiments/sums_cost.py                              # tiny, small and medium on two ranks
    python experiments/sums_cost.py --sizes=small --worlds=4 --micros=4 --rounds=12

How: one pair (or four) of gloo processes holds the same chain once for every contender: sums="backend", "tree", "exact"
with the kernel of this machine, and "exact" with its reference in torch. Rounds visit all in turn, forwards and
backwards, and ratios to the tree are taken within a round. Memory is the peak resident size of fresh processes, one
chain each, over that of a process that has only imported.

Expect:
    the tree at most 2 % slower than the backend; on gloo faster, because its reduce_scatter sends what an all_reduce
    sends and an exchange sends half. Exact sums at most 3 % slower than the tree at the small size with the kernel, 9 %
    without; at stages 0 and 1 with several micro-batches they send 8 bytes a value where the tree sends 4.

Found:
    (`--rounds=8`, tiny and small, two cores of which one was sometimes taken, torch 2.13, one thread a process)
    CPU time against the tree at stages 0 to 3: small, exact with the kernel 1.00, 1.03, 1.02, 1.02, in torch 1.09,
    1.09, 1.09, 1.10, the backend 0.99 to 1.00; tiny, exact 1.10, 1.07, 1.10, 1.22, in torch 1.70 to 1.84. One
    micro-batch a rank sends the tree's bytes at every stage. Peak memory at the small size: 4 to 10 MiB over the tree's
    179 to 195. Wall ratios lie between 0.7 and 1.6 within one row and say nothing. So both aims hold at the small size.
    Medium, quiet (`--sizes=medium --stages=1,3 --rounds=2 --steps=1`), wall and CPU time over the tree: exact 1.01 and
    0.99 at stage 1, 1.02 and 1.04 at stage 3; in torch 1.11 and 1.10, 1.12 and 1.13; the backend 1.00 and 1.02.
"""

import os
import resource
import statistics
import time

import torch
import torch.distributed as dist
from absl import app, flags
from bench_models import ADAMW, SIZES, block, init_params, summed_loss

import funczero as fz
from funczero.testing import WorkerPool

flags.DEFINE_list("worlds", ["2"], "Numbers of processes.")
flags.DEFINE_list("sizes", ["tiny", "small", "medium"], f"Model sizes of bench_models: {', '.join(SIZES)}.")
flags.DEFINE_list("stages", ["0", "1", "2", "3"], "ZeRO stages.")
flags.DEFINE_integer("micros", 1, "Micro-batches a rank and update.", lower_bound=1)
flags.DEFINE_integer("rounds", 8, "Visits of each contender.", lower_bound=1)
flags.DEFINE_integer("steps", 2, "Counted steps of a visit.", lower_bound=1)
flags.DEFINE_bool("memory", True, "Measure peak memory, too, in fresh processes.")
CONTENDERS = {
    "backend": ("backend", "auto"),
    "tree": ("tree", "auto"),
    "exact": ("exact", "auto"),
    "exact, torch": ("exact", "reference"),
}


def make(stage: int, sums: str, name: str, world: int, micros: int):
    """(step, state, this rank's rows)."""
    s = SIZES[name]

    def loss_fn(params: dict, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return summed_loss(
            params, lambda x: fz.layers(lambda p, h: block(p, h, s.heads), params["blocks"], x), batch
        ), torch.tensor(float(batch["y"].numel()))

    grad = fz.value_and_grad(loss_fn, batch=fz.P("data"), units=("blocks",))
    tx = fz.adamw(ADAMW["lr"], *ADAMW["betas"], ADAMW["eps"], ADAMW["weight_decay"])
    chain = fz.zero(grad, tx, stage=stage, accumulate=micros)
    step = fz.donate(fz.train_step(*chain, mesh={"data": world}, sums=sums, check=0))
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(s.vocab, (max(s.B, world) * micros, s.T + 1), generator=g)
    return step, step.init(init_params(s)), step.local_rows({"x": tokens[:, :-1], "y": tokens[:, 1:]})


def rounds(stage: int, name: str, world: int, micros: int, visits: int, steps: int) -> dict:
    """By contender: wall seconds and CPU seconds a step of every visit, and bytes sent a step."""
    held = {c: list(make(stage, sums, name, world, micros)) for c, (sums, _) in CONTENDERS.items()}
    out: dict = {c: ([], [], 0) for c in CONTENDERS}
    for visit in range(visits + 1):
        for c in list(CONTENDERS)[:: 1 if visit % 2 else -1]:
            step, state, rows = held[c]
            os.environ["FUNCZERO_KERNELS"] = CONTENDERS[c][1]
            state, _ = step(state, rows)  # what another contender left in the caches is gone
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            with fz.count_bytes(step) as sent:
                for _ in range(steps):
                    state, _ = step(state, rows)
            held[c][1] = state
            if visit:  # the first warms up
                out[c][0].append((time.perf_counter() - wall) / steps)
                out[c][1].append((time.process_time() - cpu) / steps)
                out[c] = (*out[c][:2], sum(sent.values()) / steps)
    return out


def peak(stage: int, sums: str, name: str, world: int, micros: int) -> float:
    """Peak resident MiB of this fresh process after four steps, over what it had before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, state, rows = make(stage, sums, name, world, micros)
    for _ in range(4):
        state, _ = step(state, rows)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def ratio(a: list, b: list) -> str:
    """The median of a round's ratio, and its range."""
    each = [x / y for x, y in zip(a, b)]
    return f"{statistics.median(each):.3f} ({min(each):.2f}-{max(each):.2f})"


def main(_: list) -> None:
    """Prints a row a contender, stage, size and world."""
    o = flags.FLAGS
    print(
        f"{'world':>5} {'size':>7} {'stage':>5} {'sums':>13} {'ms':>8} {'of the tree (min-max)':>22} {'CPU':>6}"
        f" {'MiB sent':>9} {'peak MiB':>9}"
    )
    for world, size, stage in ((w, s, t) for w in map(int, o.worlds) for s in o.sizes for t in map(int, o.stages)):
        with WorkerPool(world) as pool:
            r = pool.run(rounds, stage, size, world, o.micros, o.rounds, o.steps, timeout=900)[0]
        memory = {}
        for sums in dict.fromkeys(s for s, _ in CONTENDERS.values()) if o.memory else ():
            with WorkerPool(world) as pool:
                memory[sums] = max(pool.run(peak, stage, sums, size, world, o.micros, timeout=300))
        for c, (sums, _) in CONTENDERS.items():
            wall, cpu, sent = r[c]
            of_cpu = statistics.median(a / b for a, b in zip(cpu, r["tree"][1]))
            print(
                f"{world:5d} {size:>7} {stage:5d} {c:>13} {1e3 * statistics.median(wall):8.2f}"
                f" {ratio(wall, r['tree'][0]):>22} {of_cpu:6.3f} {sent / 2**20:9.2f} {memory.get(sums, 0):9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)

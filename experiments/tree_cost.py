"""What does the one tree cost against the backend's own sums, in step time, CPU time, bytes and memory?

Run:
    python experiments/tree_cost.py                    # 3.5 M parameters, worlds 2 and 4
    python experiments/tree_cost.py --size=medium --worlds=2 --rounds=6

How: one pair (or four) of gloo processes holds the same chain twice, sums="tree" and sums="backend"; rounds visit both
in turn, and the ratio is taken within a round. Memory is the peak resident size of fresh processes, one chain each.

Expect:
    at most 2 % slower; on gloo faster, because its reduce_scatter sends what an all_reduce sends and an exchange sends
    half.

Found (`--worlds=2 --rounds=5`, two shared cores, torch 2.13, one thread a process; world 4 not taken):
    wall ratio 1.013, 0.968, 0.965, 0.975 at stages 0 to 3 (a round's ratio lies between 0.85 and 1.10), CPU 1.03, 0.98,
    1.00, 0.97; peak memory within 3 %. The counted bytes are the logical ones and equal; on the wire gloo's own
    reduce-scatter sends twice as much.
"""

import resource
import statistics
import time

import torch
import torch.distributed as dist
from absl import app, flags
from bench_models import ADAMW, SIZES, block, init_params, summed_loss

import funczero as fz
from funczero.testing import WorkerPool

flags.DEFINE_list("worlds", ["2", "4"], "Numbers of processes.")
flags.DEFINE_enum("size", "small", list(SIZES), "Model size of bench_models.")
flags.DEFINE_integer("rounds", 8, "Visits of each contender.", lower_bound=1)
flags.DEFINE_integer("steps", 2, "Counted steps of a visit.", lower_bound=1)
SUMS = ("tree", "backend")


def make(stage: int, sums: str, name: str, world: int):
    """(step, state, this rank's rows)."""
    s = SIZES[name]

    def loss_fn(params: dict, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return summed_loss(
            params, lambda x: fz.layers(lambda p, h: block(p, h, s.heads), params["blocks"], x), batch
        ), torch.tensor(float(batch["y"].numel()))

    grad = fz.value_and_grad(loss_fn, batch=fz.P("data"), units=("blocks",))
    tx = fz.adamw(ADAMW["lr"], *ADAMW["betas"], ADAMW["eps"], ADAMW["weight_decay"])
    step = fz.donate(fz.train_step(*fz.zero(grad, tx, stage=stage), mesh={"data": world}, sums=sums, check=0))
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(s.vocab, (max(s.B, world), s.T + 1), generator=g)
    return step, step.init(init_params(s)), step.local_rows({"x": tokens[:, :-1], "y": tokens[:, 1:]})


def rounds(stage: int, name: str, world: int, visits: int, steps: int) -> dict:
    """By contender: wall seconds and CPU seconds a step of every visit, and bytes sent a step."""
    held = {sums: list(make(stage, sums, name, world)) for sums in SUMS}
    out: dict = {sums: ([], [], 0) for sums in SUMS}
    for visit in range(visits + 1):
        for sums in SUMS if visit % 2 else SUMS[::-1]:
            step, state, rows = held[sums]
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            with fz.count_bytes(step) as sent:
                for _ in range(steps):
                    state, _ = step(state, rows)
            held[sums][1] = state
            if visit:  # the first warms up
                out[sums][0].append((time.perf_counter() - wall) / steps)
                out[sums][1].append((time.process_time() - cpu) / steps)
                out[sums] = (*out[sums][:2], sum(sent.values()) / steps)
    return out


def peak(stage: int, sums: str, name: str, world: int) -> float:
    """Peak resident MiB of this fresh process after three steps."""
    step, state, rows = make(stage, sums, name, world)
    for _ in range(3):
        state, _ = step(state, rows)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(_: list) -> None:
    """Prints a row a stage and world."""
    o = flags.FLAGS
    print(
        f"{'world':>5} {'stage':>5} {'tree ms':>9} {'backend ms':>10} {'wall ratio (min-max)':>22} {'CPU ratio':>9}"
        f" {'counted MiB: tree':>17} {'backend':>8} {'peak MiB: tree':>14} {'backend':>8}"
    )
    for world in map(int, o.worlds):
        for stage in range(4):
            with WorkerPool(world) as pool:
                r = pool.run(rounds, stage, o.size, world, o.rounds, o.steps, timeout=500)[0]
            memory = []
            for sums in SUMS:
                with WorkerPool(world) as pool:
                    memory.append(max(pool.run(peak, stage, sums, o.size, world, timeout=120)))
            wall = [a / b for a, b in zip(r["tree"][0], r["backend"][0])]
            cpu = statistics.median(a / b for a, b in zip(r["tree"][1], r["backend"][1]))
            t, b = (1e3 * statistics.median(r[s][0]) for s in SUMS)
            ratio = f"{statistics.median(wall):.3f} ({min(wall):.2f}-{max(wall):.2f})"
            print(
                f"{world:5d} {stage:5d} {t:9.1f} {b:10.1f} {ratio:>22} {cpu:9.3f} {r['tree'][2] / 2**20:17.2f}"
                f" {r['backend'][2] / 2**20:8.2f} {memory[0]:14.0f} {memory[1]:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)

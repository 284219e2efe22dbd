"""What does a train step of ZeRO stages 0-3 cost, in time and in bytes, against plain torch, DDP and FSDP2?

Run:
    python experiments/bench_step.py                                 # all sizes, all contenders
    python experiments/bench_step.py --sizes=tiny --rounds=5 --contenders=ddp,fsdp,stage3 --clip=1.0
    python experiments/bench_step.py --sizes=tiny --profile=stage3   # where its time goes (--profiler=torch: operators)

How: two gloo processes of one thread hold every contender of a size. A round visits each for a few steps (the first not
counted), so noise hits all alike and ratios to DDP are taken within a round. `plain` runs on rank 0 alone with two
threads, `plain-1t` with one. All have the same parameters, batches and function: first losses must agree to float32
rounding. funczero returns the global loss, weight and norm, the peers a local loss. `sent` is what a rank wrote
(/proc/self/io: gloo's sockets) and `counted` what `fz.count_bytes` says, in bytes a parameter; `cpu` is the sum of both
ranks.

Expect:
    tiny: below FSDP2 at every stage, within a small factor of DDP. small, medium: stages 0-2 within 5 % of DDP, stage 3
    below FSDP2.
    Bytes a parameter and step on 2 ranks in float32: stages 0-2: 4; stage 3: 6 (two gathers and a scatter of half of
    all); FSDP2: 8.

Found (two shared cores; median ms a step, ratio to DDP within a round and its spread over rounds; first losses within
1e-6):
              tiny                    small, 3.5 M             medium, 25.9 M           sent, B/param
    plain      1.1 (0.29)             352 (1.01)               1128 (0.95)              0
    ddp        4.2                    353                      1193                     4.00
    fsdp      13.4 (3.23, 2.4-6.3)    424 (1.23, 1.14-1.66)    1558 (1.33, 1.27-1.35)   8.00
    stage 0    6.3 (1.55, 1.0-3.1)    354 (1.01, 0.97-1.06)    1392 (1.17, 1.07-1.30)   4.00
    stage 1    6.0 (1.48, 1.0-2.6)    352 (1.00, 0.93-1.10)    1412 (1.17, 1.11-1.28)   4.00
    stage 2    5.8 (1.47, 1.0-2.7)    351 (1.00, 0.89-1.13)    1241 (1.04, 0.99-1.17)   4.00
    stage 3    7.1 (1.85, 1.4-3.3)    365 (1.03, 0.93-1.21)    1312 (1.11, 1.05-1.39)   4.06, 5.36, 5.71
    Short of the aim: stage 3 is 3 % and 11 % slower than DDP (FSDP2: 23 % and 33 %), and stage 1 equals DDP at 3.5 M
    without being faster. With one micro-batch stages 1 and 2 are the same chain, so what they differ by is noise. The
    tiny step is not under 2 ms: with no other contender in the process its best is 2.3 (DDP 1.2), of which plain torch
    is 0.9, Python of the chain 0.4, and three short messages with their copies the rest.
"""

from __future__ import annotations

import cProfile
import functools
import os
import pstats
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from absl import app, flags
from bench_models import ADAMW, SIZES, Batch, Size, TrainStep, block, init_params, parameters, peer, summed_loss

PEERS, STAGES = ["plain", "plain-1t", "ddp", "ddp-view", "fsdp", "fsdp-keep"], ["stage0", "stage1", "stage2", "stage3"]
THREADS = {"plain": "1 x 2", "plain-1t": "1 x 1"}  # processes x threads; all others: 2 x 1
flags.DEFINE_list("sizes", list(SIZES), "Which of tiny, blocks, small, medium.")
flags.DEFINE_list("contenders", PEERS + STAGES, "Whom to run; ratios need ddp.")
flags.DEFINE_integer("rounds", 0, "Visits of every contender (0: the size's own number).")
flags.DEFINE_integer("steps", 0, "Counted steps of a visit (0: the size's own number).")
flags.DEFINE_float("clip", 0.0, "Global gradient norm to clip to (0: no clipping).")
flags.DEFINE_enum(
    "policy",
    "fp32",
    ["fp32", "bf16"],
    "bf16: computes in bfloat16 (autocast for plain and DDP), sums and updates in float32.",
)
flags.DEFINE_enum("profile", None, PEERS + STAGES, "Profile this contender on rank 0 instead of measuring.")
flags.DEFINE_enum("profiler", "python", ["python", "torch"], "What `profile` runs: cProfile or torch.profiler.")


class Contender(NamedTuple):
    """A train step, how it takes its rows out of the global batch, and (funczero) a counter of the bytes that one step
    sends.
    """

    step: TrainStep
    deal: Callable[[Batch], Batch]
    counted: Callable[[Batch], int] | None = None


Visit = NamedTuple(
    "Visit", [(field, float) for field in ("wall", "cpu", "sent", "loss")]
)  # a rank's ms, ms, bytes a step; the last step's global loss


def zero_contender(stage: int, tree: dict, s: Size, clip: float, bf16: bool) -> Contender:
    """funczero's donated step at one stage over the default group."""
    import funczero as fz

    def loss_fn(params: dict, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        run = functools.partial(fz.layers, functools.partial(block, heads=s.heads), params["blocks"])
        return summed_loss(params, run, batch), torch.tensor(float(batch["y"].numel()))

    grad = fz.value_and_grad(loss_fn, batch=fz.P("data"), units=("blocks",))
    adamw = fz.adamw(
        ADAMW["lr"], b1=ADAMW["betas"][0], b2=ADAMW["betas"][1], eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"]
    )
    chain = fz.zero(
        grad, *([fz.clip_by_global_norm(clip)] if clip else []), adamw, stage=stage, axis="data", accumulate=1
    )
    policy = f"params=float32,compute={'bfloat16' if bf16 else 'float32'},accumulate=float32"
    update = fz.donate(fz.train_step(*chain, mesh={"data": 2}, policy=policy, check=0))
    state = update.init(tree)

    def step(batch: Batch) -> torch.Tensor:
        nonlocal state
        state, metrics = update(state, batch)
        return metrics.loss

    def counted(batch: Batch) -> int:
        with fz.count_bytes(update) as sent:
            step(batch)
        return sum(sent.values())

    return Contender(step, update.local_rows, counted)


def make(name: str, s: Size, clip: float, bf16: bool) -> Contender | None:
    """The contender of that name; None on the rank that plain torch leaves idle."""
    tree, rank = init_params(s), dist.get_rank()
    if name.startswith("stage"):
        return zero_contender(int(name[-1]), tree, s, clip, bf16)
    if name.startswith("plain"):
        return Contender(peer(name, tree, s, clip, bf16), lambda batch: batch) if rank == 0 else None
    half = slice(rank * s.B // 2, (rank + 1) * s.B // 2)
    return Contender(peer(name, tree, s, clip, bf16), lambda batch: {k: v[half] for k, v in batch.items()})


def bytes_written() -> int:
    """Bytes this process has handed to write, writev and send so far."""
    with open("/proc/self/io") as f:
        return int(next(line for line in f if line.startswith("wchar")).split()[1])


def global_loss(name: str, loss: torch.Tensor) -> float:
    """The loss of the global batch: torch's data-parallel steps know only their rows'."""
    if name.startswith(("ddp", "fsdp")):
        dist.all_reduce(loss := loss / 2)
    return loss.item()


def visit(name: str, c: Contender | None, batches: list[Batch], first: int, steps: int) -> Visit:
    """One step that does not count, then `steps` that do; the other rank idles in a barrier if it has no part."""
    dist.barrier()
    if c is None:
        return Visit(0.0, 0.0, 0.0, 0.0)
    torch.set_num_threads(2 if name == "plain" else 1)
    rows = [c.deal(batches[(first + i) % len(batches)]) for i in range(steps + 1)]
    c.step(rows[0])
    if not name.startswith("plain"):
        dist.barrier()
    sent, cpu, wall = bytes_written(), time.process_time(), time.perf_counter()
    for batch in rows[1:]:
        loss = c.step(batch)
    wall, cpu, sent = time.perf_counter() - wall, time.process_time() - cpu, bytes_written() - sent
    torch.set_num_threads(1)
    return Visit(wall * 1e3 / steps, cpu * 1e3 / steps, sent / steps, global_loss(name, loss))


def profile(c: Contender, batches: list[Batch], steps: int, profiler: str) -> None:
    """Both ranks run; rank 0 prints where its time went."""
    with torch.profiler.profile() if profiler == "torch" else cProfile.Profile() as p:
        for i in range(steps):
            c.step(c.deal(batches[i % len(batches)]))
    if dist.get_rank() == 0 and profiler == "torch":
        print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=70))
    elif dist.get_rank() == 0:
        for key in ("tottime", "cumtime"):
            pstats.Stats(p).strip_dirs().sort_stats(key).print_stats(40)


def row(name: str, costs: torch.Tensor, ddp: torch.Tensor, counted: float, count: int) -> str:
    """One line of the table; costs, ddp: [rank, round, field of Visit]. wall is the slower rank's, cpu the ranks' sum,
    sent the larger.
    """
    (ms, over), (cpu, over_cpu) = (
        (f(costs), f(costs) / f(ddp)) for f in (lambda c: c[..., 0].amax(0), lambda c: c[..., 1].sum(0))
    )
    low, middle, high = ms.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ms.dtype))
    sent = costs[..., 2].amax(0).median()
    return (
        f"{name:10} {THREADS.get(name, '2 x 1'):>7} {middle:10.2f} {ms.min():8.2f} {(high - low) / middle:6.0%}"
        f" {over.quantile(0.5):6.2f} ({over.min():.2f}-{over.max():.2f}) {cpu.quantile(0.5):9.2f}"
        f" {over_cpu.quantile(0.5):6.2f} {sent / 2**20:9.3f} {sent / count:7.2f} {counted / count:7.2f}"
    )


def measure(size: str, o: dict) -> None:
    """Build every contender of a size, visit in rounds, print the table, check that the losses agree."""
    s, names, bf16 = SIZES[size], [o["profile"]] if o["profile"] else o["contenders"], o["policy"] == "bf16"
    tokens = torch.randint(0, s.vocab, (8, s.B, s.T + 1), generator=torch.Generator().manual_seed(1))
    batches = [{"x": t[:, :-1].contiguous(), "y": t[:, 1:].contiguous()} for t in tokens]
    contenders = {n: make(n, s, o["clip"], bf16) for n in names}
    first = {n: global_loss(n, c.step(c.deal(batches[0]))) if c else 0.0 for n, c in contenders.items()}
    if o["profile"]:
        return profile(contenders[names[0]], batches, o["steps"] or 4 * s.steps, o["profiler"])
    steps, rounds = o["steps"] or s.steps, o["rounds"] or s.rounds
    mine = [[visit(n, c, batches, 1 + r * (steps + 1), steps) for n, c in contenders.items()] for r in range(rounds)]
    counted = {n: c.counted(c.deal(batches[0])) for n, c in contenders.items() if c and c.counted}
    dist.all_gather_object(both := [None, None], mine)
    if dist.get_rank():
        return
    costs, count = dict(
        zip(names, torch.tensor(both, dtype=torch.float64).permute(2, 0, 1, 3), strict=True)
    ), parameters(s)
    head = f"{'':10} threads  median ms   min ms spread   /ddp (min-max)     cpu ms   /ddp  sent MiB B/param counted"
    print(f"\n{size}: {count:,} parameters, {steps} steps x {rounds} rounds\n{head}")
    for n in names:
        print(row(n, costs[n], costs.get("ddp", costs[n] * torch.nan), counted.get(n, torch.nan), count), flush=True)
    apart = max((costs[n][0, :, 3] - costs[names[0]][0, :, 3]).abs().max().item() for n in names)
    print("first losses:", *(f"{n} {v:.6f}" for n, v in first.items()), f"| furthest apart later: {apart:.1e}")
    assert max(first.values()) - min(first.values()) < (
        3e-2 if bf16 else 2e-6
    ), "the contenders do not compute the same"


def worker(rank: int, rendezvous: str, o: dict) -> None:
    """One of the two processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for size in o["sizes"]:
        measure(size, o)
    dist.destroy_process_group()


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            worker, (os.path.join(folder, "rendezvous"), flags.FLAGS.flag_values_dict()), nprocs=2
        )


if __name__ == "__main__":
    app.run(main)

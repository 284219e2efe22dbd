"""What does a train step of ZeRO cost, in time, CPU time, bytes, memory and start-up, against plain torch, DDP, FSDP2,
DeepSpeed and JAX?

Run:
    python experiments/bench_step.py                         # everything: hours; Markdown and PNG in runs/bench_step
    python experiments/bench_step.py --sizes=tiny --ranks=2 --policies=fp32 --contenders=ddp,fsdp,stage3 --clip=1.0
    python experiments/bench_step.py --sizes=tiny --profile=stage3  # where its time goes (--profiler=torch: operators)

How: contenders (bench_contenders.py says which) run in heats: gloo processes of one thread hold DDP and a few others. A
round visits each for a few steps, the first not counted, in a new order, so noise hits all alike and ratios to DDP are
taken within a round. All have the same parameters, batches and function: losses must agree to float32 rounding (bf16:
3e-2). funczero returns the global loss, weight and norm, the peers a local loss. `sent` is what a rank wrote
(/proc/self/io: gloo's sockets) and `counted` what `fz.count_bytes` says, in bytes a parameter; `cpu` is the sum of all
ranks. Then each lives in processes of its own (bench_lives.py): `start` is the time from the start of its interpreter
to the end of its first step, `over` the peak of a process's memory over what it has after its imports.

Expect:
    ZeRO-1 and 2 at most 0.97 of DDP, ZeRO-3 0.99, in fp32 at 3.5 and 26 M; 1.00 of DDP's autocast in bf16; the engine
    within 5 % of the pure step. Peak memory of ZeRO-3 at 26 M at most 0.75 of DDP's.
    Bytes a parameter and step on 2 ranks in float32: stages 0-2: 4; stage 3: at most 6 (two gathers and a scatter of
    half of all); FSDP2: 8.

Found (quiet, two cores; medians: wall of DDP's within a round, CPU time of DDP's; `start` and `over` of one life):
    --ranks=2 --policies=fp32 --rounds=4 (medium: 3), all contenders below in one command, DeepSpeed 0.19.8, JAX 0.10.2
                  tiny                     small, 3.5 M                     medium, 25.9 M                  sent
                  wall  cpu   over start   wall  cpu   over  start          wall  cpu   over  start         B/param
    ddp, ms       6.9   11.4    47   4.1   931   1824   226    5.9          3054  6078   681    8.1         4.00
    plain         0.58  0.70    47   4.1   1.01  1.03   290    5.7                                          0
    fsdp          3.10  2.90    51   4.7   1.10  1.08   229    5.9          1.11  1.09   813    8.8         8.00
    deepspeed1    2.03  1.94    98   6.9   1.07  1.06   302    8.5                                          6.00
    deepspeed3    3.28  3.40    99   7.3   1.09  1.09   333    9.3          1.19  1.16  1060   12.3         6.00
    jax           0.45  0.34   257   8.8   1.85  1.81   818   16.6                                          0
    stage 0       1.71  1.70    35   4.1   1.10  1.08   172    5.8          1.04  1.03   757    8.1         4.00
    stage 1       1.47  1.67    34   4.1   1.05  1.05   163    5.8          1.01  1.00   566    8.1         4.00
    stage 2       1.59  1.68    35   4.3   1.06  1.04   168    5.8                                          4.00
    stage 3       1.64  1.69    37   4.4   1.07  1.06   161    6.0          1.02  1.01   476    8.2         5.36, 5.71
    engine 1      1.71  1.81    59   5.8   1.04  1.04   233    7.4                                          4.00
    engine 3      2.01  1.97    57   6.4   1.03  1.04   204    6.8          1.07  1.05   565    9.8         5.36, 5.71
    captured 1    1.57  1.56   111   9.6   0.99  1.01   247   20.2                                          4.00
    captured 3    1.64  1.53   112  10.3   1.01  1.02   219   11.9                                          5.36
    Stage 0 sums during its backward since. --contenders=ddp,stage0,stage1,stage3 --rounds=4, later that day, stages 0,
    1, 3: small 1.02, 1.01, 1.02 (CPU time 1.03, 1.02, 1.03; spread 2 %), blocks 1.32, 1.30, 1.75 (1.23, 1.25 in another
    run); medium, stage 0: 1.01, 1.02 of the CPU time, 645 MiB where DDP has 692. Ratios of small move by 0.04 from run
    to run.
    --ranks=4 --policies=fp32 --rounds=3 (two cores, so ranks take turns), stages 0, 1, 3: tiny 1.51, 1.58, 1.60
    (FSDP2 3.56); small 1.06, 1.03, 1.06 (FSDP2 1.20); 16-bit sums are not used, so 6.00, 6.00, 8.04 bytes.
    --ranks=2 --policies=bf16 --rounds=3: tiny 1.44, 1.39, 1.45 with 3.0, 2.0, 2.0 bytes; small by CPU time 1.01, 1.00,
    1.00 with 3.00, 2.00, 2.68 bytes (a step takes 10 s: this processor has no bfloat16).
    --sizes=blocks (64 of width 64; aims 1.15, 1.15, 1.5) on four ranks: 1.42, 1.33, 1.55, before that change. Of a
    block of 0.65 ms that DDP does not have, 0.2 are its leaves in autograd's graph (a Python function of twelve
    outputs), 0.2 the copy into the message, 0.1 the arrival of its gradients; at stage 3 the gathers take 0.5 more, and
    what a backward asks for again 0.6.
    Short of the aims of time: floor.py says that of small the floor is 0.97 and 0.98.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import bench_report
import torch
import torch.distributed as dist
from absl import app, flags
from bench_contenders import LOCAL, NAMES, Contender, absent, make
from bench_lives import lives
from bench_models import SIZES, Batch, Size, parameters
from bench_report import Row

flags.DEFINE_list("sizes", list(SIZES), f"Which of {', '.join(SIZES)}.")
flags.DEFINE_list("ranks", ["2", "4"], "Numbers of processes.")
flags.DEFINE_list(
    "policies", ["fp32", "bf16"], "bf16: computes in bfloat16 (autocast for plain and DDP), sums in float32."
)
flags.DEFINE_list("contenders", NAMES, "Whom to run; DDP always runs, because ratios need it.")
flags.DEFINE_integer("heat", 6, "Contenders that share processes, DDP among them.", lower_bound=2)
flags.DEFINE_integer("rounds", 0, "Visits of every contender (0: the size's own number).")
flags.DEFINE_integer("steps", 0, "Counted steps of a visit (0: the size's own number).")
flags.DEFINE_integer("lives", 1, "Lives of every contender in processes of its own (0: neither memory nor start-up).")
flags.DEFINE_float("clip", 0.0, "Global gradient norm to clip to (0: no clipping).")
flags.DEFINE_string("out", "runs/bench_step", "Folder of found.json, bench_step.md and bench_step.png.")
flags.DEFINE_enum("profile", None, NAMES, "Profile this contender on rank 0 instead of measuring.")
flags.DEFINE_enum("profiler", "python", ["python", "torch"], "What `profile` runs: cProfile or torch.profiler.")


class Visit(NamedTuple):
    """A rank's few steps of one contender: milliseconds and bytes a step, and the last step's global loss."""

    wall: float = 0.0
    cpu: float = 0.0
    sent: float = 0.0
    loss: float = 0.0


def fitted(s: Size, ranks: int) -> Size:
    """A size with rows for every rank."""
    return s._replace(B=max(s.B, ranks))


def batches_of(s: Size) -> list[Batch]:
    """Eight global batches."""
    tokens = torch.randint(0, s.vocab, (8, s.B, s.T + 1), generator=torch.Generator().manual_seed(1))
    return [{"x": t[:, :-1].contiguous(), "y": t[:, 1:].contiguous()} for t in tokens]


def bytes_written() -> int:
    """Bytes this process has handed to write, writev and send so far."""
    with open("/proc/self/io") as f:
        return int(next(line for line in f if line.startswith("wchar")).split()[1])


def global_loss(name: str, loss: torch.Tensor) -> float:
    """The loss of the global batch: the peers' data-parallel steps know only their rows'."""
    if name.startswith(LOCAL):
        dist.all_reduce(loss := loss / dist.get_world_size())
    return loss.item()


def visit(name: str, c: Contender | None, batches: list[Batch], first: int, steps: int) -> Visit:
    """One step that does not count, then `steps` that do; the others idle in a barrier if they have no part."""
    dist.barrier()
    if c is None:
        return Visit()
    torch.set_num_threads(dist.get_world_size() if name == "plain" else 1)
    rows = [c.deal(batches[(first + i) % len(batches)]) for i in range(steps + 1)]
    c.step(rows[0])
    if c.deal(batches[0])["x"].shape != batches[0]["x"].shape:  # it has its own rows alone, so the others run, too
        dist.barrier()
    sent, cpu, wall = bytes_written(), time.process_time(), time.perf_counter()
    for batch in rows[1:]:
        loss = c.step(batch)
    wall, cpu, sent = time.perf_counter() - wall, time.process_time() - cpu, bytes_written() - sent
    torch.set_num_threads(1)
    return Visit(wall * 1e3 / steps, cpu * 1e3 / steps, sent / steps, global_loss(name, loss))


def profile(c: Contender | None, batches: list[Batch], steps: int, profiler: str) -> None:
    """All ranks run; rank 0 prints where its time went."""
    if c is None:
        return
    with torch.profiler.profile() if profiler == "torch" else cProfile.Profile() as p:
        for i in range(steps):
            c.step(c.deal(batches[i % len(batches)]))
    if dist.get_rank() == 0 and profiler == "torch":
        print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=70))
    elif dist.get_rank() == 0:
        for key in ("tottime", "cumtime"):
            pstats.Stats(p).strip_dirs().sort_stats(key).print_stats(40)


class Heat(NamedTuple):
    """Contenders that share processes."""

    size: str
    ranks: int
    policy: str
    names: list[str]


def measure(heat: Heat, o: dict[str, Any]) -> dict[str, Any]:
    """Build every contender of a heat, visit them in rounds, check that the losses agree. On rank 0: what they cost by
    [round][contender][rank], and the bytes that funczero counts.
    """
    s, bf16 = fitted(SIZES[heat.size], heat.ranks), heat.policy == "bf16"
    batches, steps, rounds = batches_of(s), o["steps"] or s.steps, o["rounds"] or s.rounds
    contenders = {n: make(n, s, o["clip"], bf16) for n in heat.names}
    first = {n: global_loss(n, c.step(c.deal(batches[0]))) if c else 0.0 for n, c in contenders.items()}
    if o["profile"]:
        return profile(contenders[o["profile"]], batches, o["steps"] or 4 * s.steps, o["profiler"]) or {}
    mine: list[dict[str, Visit]] = []
    for r in range(rounds):
        order = random.Random(r).sample(heat.names, len(heat.names))
        mine.append({n: visit(n, contenders[n], batches, 1 + r * (steps + 1), steps) for n in order})
    counted = {n: c.counted(c.deal(batches[0])) for n, c in contenders.items() if c and c.counted}
    dist.all_gather_object(every := [None] * heat.ranks, mine)
    visits = [{n: [rank[r][n] for rank in every] for n in heat.names} for r in range(rounds)]
    apart = max(max(abs(v[n][0].loss - v["ddp"][0].loss) for n in heat.names) for v in visits)
    if dist.get_rank() == 0 and max(first.values()) - min(first.values()) > (3e-2 if bf16 else 2e-6):
        raise AssertionError(f"the contenders do not compute the same: first losses {first}")
    return {"visits": visits, "counted": counted, "first": first, "apart": apart, "steps": steps}


def worker(rank: int, folder: str, heat: Heat, o: dict[str, Any]) -> None:
    """One of the processes of a heat."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(heat.ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=heat.ranks)
    found = measure(heat, o)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def heats(size: str, ranks: int, policy: str, o: dict[str, Any]) -> tuple[list[Heat], dict[str, str]]:
    """Who runs with whom, and who does not run and why."""
    names = [o["profile"]] if o["profile"] else list(dict.fromkeys(["ddp", *o["contenders"]]))
    why = {n: text for n in names if (text := absent(n, ranks))}
    if o["profile"]:
        return [Heat(size, ranks, policy, names)] * (not why), why
    others, room = [n for n in names if n not in why and n != "ddp"], o["heat"] - 1
    parts = [others[i : i + room] for i in range(0, len(others), room)] or [[]]
    return [Heat(size, ranks, policy, ["ddp", *part]) for part in parts], why


def run(heat: Heat, o: dict[str, Any]) -> list[Row]:
    """What a heat cost, a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder, heat, o), nprocs=heat.ranks)
        found = json.loads(Path(folder, "found.json").read_text())
    if o["profile"]:
        return []
    count = parameters(SIZES[heat.size])
    rows = []
    for n in heat.names:
        costs = [[Visit(*x) for x in v[n]] for v in found["visits"]]
        base = [[Visit(*x) for x in v["ddp"]] for v in found["visits"]]
        rows.append(bench_report.row(heat, n, costs, base, found["counted"].get(n), count))
    print(bench_report.text(rows, found["steps"]), flush=True)
    print(f"furthest apart from DDP's loss: {found['apart']:.1e}", flush=True)
    return rows


def main(_: list[str]) -> None:
    o, rows, missing = flags.FLAGS.flag_values_dict(), list[Row](), dict[str, str]()
    for ranks in map(int, o["ranks"][: 1 if o["profile"] else None]):
        for policy in o["policies"][: 1 if o["profile"] else None]:
            for size in o["sizes"]:
                parts, why = heats(size, ranks, policy, o)
                missing |= {f"{n} on {ranks} ranks": text for n, text in why.items()}
                found = [row for heat in parts for row in run(heat, o)]
                found = bench_report.pooled(found)
                rows += [lives(row, o) for row in found] if o["lives"] else found
                if not o["profile"]:
                    bench_report.write(Path(o["out"]), rows, missing)  # what is there, should the rest be cut off
    for name, text in missing.items():
        print(f"not run: {name}: {text}")


if __name__ == "__main__":
    app.run(main)

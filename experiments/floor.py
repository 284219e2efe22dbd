"""What would a step take if it did nothing but its arithmetic and its messages, and where does the rest go?

Run:
    python experiments/floor.py                               # tiny and small, two ranks, stages 0, 1, 3
    python experiments/floor.py --sizes=tiny --rounds=20

How: ranks of one thread visit all contenders in turn, forwards and backwards; medians. `alone` is plain torch with a
fused AdamW on a rank's rows, on all ranks at once and without a message. `messages` replays what the contender sends:
as many exchanges as its profile counts, of as many bytes. `floor` is their sum, because each rank has one core. The
profile says what a stage's time goes to, by the names of the printed chain; it costs time itself, so only shares count.

Expect: small is within a few percent of its floor at every stage. What tiny lies over it is the same number of
milliseconds at every stage: Python, autograd's nodes at the seam, and views.

Found:
    (quiet, two cores, `--rounds=8`, ms; about five minutes a size that is not tiny)
    tiny: alone 2.88. DDP 6.47 is 1.92 of its floor, stages 0, 1, 3 (10.7, 10.6, 11.8) are 2.63, 2.63, 2.66 of theirs:
    4 ms more than DDP, of which the profile gives `mean` (the norm, and the sum in which ranks compare their logs) 1.5,
    `wait` 3, the seam's own operations the rest. Messages alone are 1.1 to 1.6, where DDP's one is 0.5.
    small: alone 863. DDP 913 is 1.04 of its floor, stages 0, 1, 3 (940, 934, 966) are 1.06, 1.06, 1.08 of theirs. So
    the aim of 0.97 of DDP for stages 0 and 1 is what arithmetic and messages take by themselves (0.967), and that of
    0.99 for stage 3 a percent above it (0.979). `mean` takes 19 to 26 ms of the 50 to 70 over the floor: it squares and
    sums every gradient exactly, in torch operations. As a kernel it takes 4 ms, 2 where ranks share it (measured since:
    bench_step.py). 64 blocks did not end within the time that there was.
"""

import statistics
import time

import torch
import torch.distributed as dist
from absl import app, flags
from bench_contenders import make
from bench_models import SIZES, init_params, parameters, peer

import funczero as fz
from funczero.testing import WorkerPool

flags.DEFINE_integer("ranks", 2, "Processes.", lower_bound=2)
flags.DEFINE_list("sizes", ["tiny", "small"], f"Of bench_models: {', '.join(SIZES)}.")
flags.DEFINE_list("contenders", ["ddp", "stage0", "stage1", "stage3"], "Of bench_contenders.")
flags.DEFINE_integer("rounds", 12, "Visits of each contender.", lower_bound=1)
flags.DEFINE_integer("milliseconds", 200, "About how long a visit is.", lower_bound=1)
flags.DEFINE_integer("rows", 8, "Lines of a profile.", lower_bound=1)


def sent(name: str, contender, batch: dict, size: str) -> tuple[float, float]:
    """(messages, bytes that this rank sends) an update."""
    if contender.counted is None:  # one bucket of DistributedDataParallel's 25 MiB after the other, there and back
        n = 4 * parameters(SIZES[size])
        return max(1, round(n / 25e6)), n
    calls, rows = 5, contender.deal(batch)
    with fz.profile() as seen:
        for _ in range(calls):
            contender.step(rows)
    return sum(t.launches for t in seen.travels.values()) / calls, contender.counted(rows)


def exchange(messages: float, sends: float):
    """A function that sends so many bytes to the other ranks in so many messages."""
    ranks, many = dist.get_world_size(), max(1, round(messages))
    part = max(1, round(sends / many / 4 / (ranks - 1)))  # floats for each of the others
    x, out = torch.zeros(ranks * part), torch.zeros(ranks * part)

    def send(_: dict) -> None:
        for _ in range(many):
            dist.all_to_all_single(out, x)

    return send


def measured(size: str, names: list, visits: int, ms: int, lines: int) -> tuple[dict, dict]:
    """(by name, the milliseconds of an update in every visit; by contender, messages, bytes and the profile)."""
    s = SIZES[size]
    tokens = torch.randint(s.vocab, (s.B, s.T + 1), generator=torch.Generator().manual_seed(0))
    batch = {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}
    per = max(1, s.B // dist.get_world_size())
    own = {n: x[dist.get_rank() * per :][:per] for n, x in batch.items()}
    runs, facts = {"alone": (peer("plain-1t", init_params(s), s, 0.0, False), own)}, {}
    for name in names:
        contender = make(name, s, 0.0, False)
        rows = contender.deal(batch)
        for _ in range(4):
            contender.step(rows)
        messages, sends = sent(name, contender, batch, size)
        runs[name] = contender.step, rows
        runs[f"messages of {name}"] = exchange(messages, sends), rows
        facts[name] = [messages, sends, ""]
        if contender.counted is not None:
            with fz.profile() as seen:
                for _ in range(20):
                    contender.step(rows)
            facts[name][2] = "\n".join(str(seen).splitlines()[1 : 1 + lines])
    times = {name: [] for name in runs}
    counts = {}
    for name, (step, rows) in runs.items():
        begin = time.perf_counter()
        step(rows)
        counts[name] = torch.tensor(max(2, round(ms / 1e3 / (time.perf_counter() - begin))))
        dist.broadcast(counts[name], 0)
    for visit in range(visits):
        for name in list(runs)[:: 1 if visit % 2 else -1]:
            step, rows = runs[name]
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(int(counts[name])):
                step(rows)
            times[name].append(1e3 * (time.perf_counter() - begin) / int(counts[name]))
    return times, facts


def main(_: list) -> None:
    """Prints a table a size, and a profile a stage."""
    o = flags.FLAGS
    with WorkerPool(o.ranks) as pool:
        for size in o.sizes:
            times, facts = pool.run(measured, size, o.contenders, o.rounds, o.milliseconds, o.rows, timeout=1800)[0]
            median = {name: statistics.median(xs) for name, xs in times.items()}
            print(f"\n{size}: alone {median['alone']:.2f} ms\n")
            print("| step | ms | of DDP | messages | kB sent | messages alone, ms | floor, ms | of the floor |")
            print("|---|--:|--:|--:|--:|--:|--:|--:|")
            for name, (messages, sends, _) in facts.items():
                took, travel = median[name], median[f"messages of {name}"]
                floor = median["alone"] + travel
                of = f"{took / median['ddp']:.2f}" if "ddp" in median else ""
                print(
                    f"| {name} | {took:.2f} | {of} | {messages:.0f} | {sends / 1e3:,.0f} | {travel:.2f} | {floor:.2f}"
                    f" | {took / floor:.2f} |"
                )
            for name, (*_, profile) in facts.items():
                if profile:
                    print(f"\n{size}, {name}:\n{profile}", flush=True)


if __name__ == "__main__":
    app.run(main)

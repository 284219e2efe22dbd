"""What does fz.compile gain, and where does it not?

Run:
    python experiments/capture.py                                  # tiny and small, stages 0, 1, 3, one and two ranks
    python experiments/capture.py --sizes=tiny --worlds=1 --stages=0 --rounds=4

How: gloo processes of one thread hold the same chain three times: eager, its recording run operation by operation
(graph), and its recording compiled (inductor). Rounds visit all in turn, forwards and backwards; ratios to eager are
taken within a round. `first` is the wall time of the first update, compilation included; torch's cache on disk is a new
folder for every world, so it is cold.

Expect:
    tiny, where Python is most of a step: half of eager's CPU time, and on two ranks at most 1.0 ms at stage 3. small,
    where matrix products are: within a few percent.

Found:
    (two shared cores that others used, one thread a process, about three times slower than quiet; ratios to eager,
    wall and CPU time)
    tiny, one process, stages 0, 1, 3: inductor 0.73, 0.73, 0.72 (3.9, 3.7, 3.5 ms); graph 1.08, 1.07, 1.07.
    tiny, two ranks, stages 0, 1, 3: inductor 0.81, 0.84, 0.81 and 0.84, 0.84, 0.82 of CPU time; graph 1.05 to 1.08.
    small (`--rounds=5 --milliseconds=600 --stages=0,3`): inductor 1.02 and 1.04 in one process, 0.99 and 0.99 on two
    ranks; graph 1.01, 1.02, 1.00, 0.99.
    The first update takes 36 to 45 s with a cold cache, of which recording is 1 to 3, on two ranks as in one process
    (43 s): who comes second waits for the first one's code. The other stages take 1 s then, as they share segments.
    So Python and autograd of the loss go, which is a quarter of a tiny step; what is left are the chain, views of
    buffers, the optimizer and messages, none of which is captured. The aim of half, and of 1.0 ms at stage 3, is not
    reached. Running a recording operation by operation costs more than autograd does.
"""

import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from absl import app, flags
from bench_models import ADAMW, SIZES, block, init_params, summed_loss

import funczero as fz
from funczero.testing import WorkerPool

flags.DEFINE_list("worlds", ["1", "2"], "Numbers of processes.")
flags.DEFINE_list("sizes", ["tiny", "small"], f"Model sizes of bench_models: {', '.join(SIZES)}.")
flags.DEFINE_list("stages", ["0", "1", "3"], "ZeRO stages.")
flags.DEFINE_integer("rounds", 12, "Visits of each contender.", lower_bound=1)
flags.DEFINE_integer("milliseconds", 150, "About how long a visit is.", lower_bound=1)
CONTENDERS = ("eager", "graph", "inductor")


def make(stage: int, name: str, world: int):
    """(step, a tree of parameters, this rank's rows)."""
    s = SIZES[name]

    def loss_fn(params: dict, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return summed_loss(
            params, lambda x: fz.layers(lambda p, h: block(p, h, s.heads), params["blocks"], x), batch
        ), torch.tensor(float(batch["y"].numel()))

    grad = fz.value_and_grad(loss_fn, batch=fz.P("data"), units=("blocks",))
    tx = fz.adamw(ADAMW["lr"], *ADAMW["betas"], ADAMW["eps"], ADAMW["weight_decay"])
    step = fz.donate(fz.train_step(*fz.zero(grad, tx, stage=stage, accumulate=1), mesh={"data": world}, check=0))
    tokens = torch.randint(s.vocab, (max(s.B, world), s.T + 1), generator=torch.Generator().manual_seed(0))
    return step, init_params(s), step.local_rows({"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()})


def rounds(stage: int, name: str, world: int, visits: int, ms: int, cache: str) -> dict:
    """By contender: wall and CPU seconds a step of every visit, seconds of the first update, the last loss."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    step, params, rows = make(stage, name, world)
    steps = {c: step if c == "eager" else fz.compile(step, mode=c) for c in CONTENDERS}
    states, out = {c: s.init(params) for c, s in steps.items()}, {}
    for c, s in steps.items():
        begin = time.perf_counter()
        states[c], _ = s(states[c], rows)
        out[c] = [[], [], time.perf_counter() - begin, 0.0]
    for c, s in steps.items():
        begin = time.perf_counter()
        states[c], _ = s(states[c], rows)
        once = time.perf_counter() - begin
    count = torch.tensor(max(2, round(ms / 1e3 / once)))
    if world > 1:
        dist.broadcast(count, 0)
    for visit in range(visits + 1):
        for c in CONTENDERS[:: 1 if visit % 2 else -1]:
            states[c], _ = steps[c](states[c], rows)  # what another contender left in the caches is gone
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(int(count)):
                states[c], metrics = steps[c](states[c], rows)
            if visit:  # the first warms up
                out[c][0].append((time.perf_counter() - wall) / int(count))
                out[c][1].append((time.process_time() - cpu) / int(count))
            out[c][3] = metrics.loss.item()
    return out


def main(_: list) -> None:
    """Prints a row a world, size, stage and contender."""
    o = flags.FLAGS
    print("| ranks | size | stage | step | ms | least ms | of eager | CPU ms | of eager | first, s | last loss |")
    print("|--:|---|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for world in map(int, o.worlds):
        with WorkerPool(world) as pool, tempfile.TemporaryDirectory() as cache:
            for size, stage in ((s, t) for s in o.sizes for t in map(int, o.stages)):
                found = pool.run(rounds, stage, size, world, o.rounds, o.milliseconds, cache, timeout=1800)[0]
                for c, (wall, cpu, first, loss) in found.items():
                    of = [
                        statistics.median(x / y for x, y in zip(mine, found["eager"][i]))
                        for i, mine in enumerate((wall, cpu))
                    ]
                    print(
                        f"| {world} | {size} | {stage} | {c} | {1e3 * statistics.median(wall):.2f}"
                        f" | {1e3 * min(wall):.2f} | {of[0]:.2f} | {1e3 * statistics.median(cpu):.2f} | {of[1]:.2f}"
                        f" | {first:.1f} | {loss:.6f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    app.run(main)

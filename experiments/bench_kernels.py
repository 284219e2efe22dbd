"""How fast are the kernels, beside plain copies, beside their references, beside torch's fused AdamW?

Run:
    python experiments/bench_kernels.py                         # one thread, 3.5 M values; AdamW of 50 M
    python experiments/bench_kernels.py --threads=2 --rounds=30

How: rounds visit every contender once, in turn and in the opposite turn, so that what else the machine does falls on
all; a figure is the median of the rounds, with the quartiles, of CPU time with one thread and of wall time with more.
"x" is a copy of the values, "moved" one that reads and writes as many bytes as the kernel does; into fresh memory where
the kernel returns a new tensor. The ratios are their times over the kernel's: above 1 the kernel is faster than memory
is copied.

Expect:
    int8 quantise at least 0.8 of a copy with one thread; AdamW with unscale, clip and skip no slower than torch's fused
    AdamW that does none of them, since it reads and writes the same bytes.

Found (a quiet machine, two cores; torch 2.13, AMD EPYC of the first kind, g++ 12):
    3.5 M values, one thread, milliseconds of CPU time; x: ratio of a copy of the values, moved: of as many bytes
                                float32   x     moved  reference       bfloat16   x     moved  reference
    int8 quantise               3.60      0.69  0.43   17.6            3.42       0.38  0.28   21.2
    int8 dequantise             2.42      1.04  0.67    6.7            3.13       0.43  0.34    9.1
    int8 dequantise, add, q.    6.11      0.42  0.31   27.0            5.67       0.25  0.24   31.8
    int4 quantise               3.87      0.67  0.35   19.6            3.64       0.38  0.24   24.3
    int4 dequantise             2.55      1.02  0.59   10.0            3.48       0.40  0.24   14.2
    int4 dequantise, add, q.    6.51      0.41  0.25   36.9            6.28       0.21  0.16   39.8
    e4m3 quantise               6.53      0.39  0.24   19.7            6.45       0.21  0.16   23.0
    e4m3 dequantise             3.00      0.92  0.54   25.5            4.03       0.33  0.24   28.2
    hadamard 16                 6.99      0.38  0.38   51.6
    to grid and add             7.19      0.39  0.94   60.4            5.42       0.25  1.06   56.1
    from grid                   5.88      0.44  0.63   12.9            5.60       0.21  0.59   10.9
    int8 quantise is short of its aim (0.69 of a copy of what it reads): its arithmetic takes 0.6 ns a value, and this
    CPU has vectors of 16 bytes. A product with 127 / absmax in place of a quotient would reach it, with other codes
    than the reference's. 16-bit values cost what 32-bit ones do.
    AdamW of 50 M, one thread: torch's alone 88.7 (85-91), with unscale and skip 106 (105-111); ours with unscale,
    clip and skip 103 (102-105), and 85.7 (84-87) where the factor is a power of two, where it is met. So it is 17 %
    short of its aim with any other factor: torch's bits want a division a value more, and divisions are what an update
    waits for here. It is never slower than what ran before. A skipped update takes 0.2 ms; moving as many bytes 117.
"""

import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from absl import app, flags

from funczero.kernels.adamw.reference import Rates
from funczero.kernels.block_quantise.reference import payload
from funczero.kernels.registry import kernel, used

flags.DEFINE_integer("values", 3_500_000, "Values of a buffer.", lower_bound=1)
flags.DEFINE_integer("adamw_values", 50_000_000, "Values of AdamW's parameters.", lower_bound=16)
flags.DEFINE_integer("threads", 1, "Threads.", lower_bound=1)
flags.DEFINE_integer("rounds", 15, "Visits of every contender.", lower_bound=3)
flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Dtypes of the values.")
flags.DEFINE_bool("reference", True, "Also the references, which take most of the time.")
CPU, META = torch.device("cpu"), torch.device("meta")  # on the latter the registry gives the reference
BLOCK, WIDTH, LEAVES = 2048, 16, 100
Call = Callable[[], Any]


class Row(NamedTuple):
    """A call of a kernel, the bytes that it reads and writes, and whether it returns a new tensor."""

    name: str
    kernel: str
    call: Callable[[ModuleType], Any]
    moved: int
    fresh: bool


def quantising(x: torch.Tensor, form: str) -> list[Row]:
    """Values to codes and back in one form."""
    n, lengths, name = x.numel(), (x.numel(),), "block_quantise"
    codes, tops = kernel(name, CPU).quantise(x, lengths, BLOCK, form)
    into, small = torch.empty_like(codes), payload(n, form)
    return [
        Row(
            f"{form} quantise", name, lambda m: m.quantise(x, lengths, BLOCK, form, None, into), x.nbytes + small, False
        ),
        Row(
            f"{form} dequantise",
            name,
            lambda m: m.dequantise(codes, tops, lengths, BLOCK, form, x.dtype),
            x.nbytes + small,
            True,
        ),
        Row(
            f"{form} dequantise, add, quantise",
            name,
            lambda m: m.requantise(codes, tops, x, lengths, BLOCK, form),
            x.nbytes + 2 * small,
            True,
        ),
    ]


def others(x: torch.Tensor) -> list[Row]:
    """The Hadamard transform and sums on a grid."""
    n = x.numel()
    step = -(-n // LEAVES)
    bounds = tuple((a, min(a + step, n)) for a in range(0, n, step))
    low, shifts = torch.zeros(n, dtype=torch.int64), torch.full((len(bounds),), 30)
    whole = x[: n - n % WIDTH]
    turned = Row(f"hadamard {WIDTH}", "hadamard", lambda m: m.hadamard(whole, (len(whole),), WIDTH), 2 * x.nbytes, True)
    return [
        *([turned] if x.itemsize > 2 else []),
        Row("to grid and add", "grid", lambda m: m.to_grid_add(x, bounds, shifts, low), x.nbytes + 16 * n, False),
        Row("from grid", "grid", lambda m: m.from_grid(low, None, bounds, shifts, x.dtype), x.nbytes + 8 * n, True),
    ]


def copying(nbytes: int, fresh: bool) -> Call:
    """A copy of so many bytes."""
    source = torch.ones(nbytes, dtype=torch.uint8)
    there = torch.ones_like(source)
    return source.clone if fresh else lambda: there.copy_(source)


def updates(n: int) -> dict[str, Call]:
    """Contenders of one update of n float32 parameters."""
    g = torch.Generator().manual_seed(0)
    params, grads, mu = (torch.randn(n, generator=g) for _ in range(3))
    nu, count, no = torch.rand(n, generator=g), torch.tensor(3.0), torch.tensor(0.0)
    rates, one = Rates(1e-3, 0.9, 0.999, 0.01, 1e-8, True), torch.tensor(1.0)
    plain = dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False)
    leaves = ([params], [grads], [mu], [nu])
    update = lambda device, factor, found: lambda: kernel("adamw", device).update(*leaves, count, factor, found, rates)
    ours = used("adamw", CPU)
    return {
        "torch's fused AdamW alone": lambda: torch._fused_adamw_(*leaves, [], [count], **plain),
        "torch's, unscale and skip": update(META, one, no),  # by 1, which keeps the gradients as they are
        f"{ours}: unscale, clip and skip": update(CPU, torch.tensor(0.7), no),
        f"{ours}: the same by a power of two": update(CPU, torch.tensor(2.0**-7), no),
        f"{ours}: a skipped update": update(CPU, one, one),
        "a copy that moves 28 bytes a value": copying(14 * n, False),
    }


def timed(contenders: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Quartiles of milliseconds by contender; the first round warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for visit in range(rounds + 1):
        for name in list(contenders)[:: 1 if visit % 2 else -1]:
            begin = clock()
            contenders[name]()
            if visit:
                found[name].append((clock() - begin) * 1e3)
    return {name: statistics.quantiles(x, n=4) for name, x in found.items()}


def table(x: torch.Tensor, rounds: int, reference: bool) -> None:
    """All kernels but AdamW on these values."""
    print(f"\n{x.numel()} values of {x.dtype}")
    print(f"{'kernel':32}{'form':6}{'ms':>20}{'x':>7}{'ratio':>6}{'moved':>7}{'ratio':>6}{'reference':>11}")
    for row in [r for form in ("int8", "int4", "e4m3") for r in quantising(x, form)] + others(x):
        contenders: dict[str, Call] = {
            "fast": lambda r=row: r.call(kernel(r.kernel, CPU)),
            "x": copying(x.nbytes, row.fresh),
            "moved": copying(row.moved // 2, row.fresh),
        }
        if reference:
            contenders["reference"] = lambda r=row: r.call(kernel(r.kernel, META))
        found = timed(contenders, rounds)
        low, mid, high = found["fast"]
        beside = "".join(f"{found[what][1]:7.2f}{found[what][1] / mid:6.2f}" for what in ("x", "moved"))
        slow = f"{found['reference'][1]:11.2f}" if reference else ""
        print(
            f"{row.name:32}{used(row.kernel, CPU):6}{f'{mid:.2f} ({low:.2f} {high:.2f})':>20}{beside}{slow}", flush=True
        )


def main(_: list[str]) -> None:
    f = flags.FLAGS
    torch.set_num_threads(f.threads)
    print(f"torch {torch.__version__}, {f.threads} thread(s); milliseconds: median (quartiles)")
    for name in f.dtypes:
        table(torch.randn(f.values).to(getattr(torch, name)), f.rounds, f.reference)
    print(f"\nAdamW of {f.adamw_values} float32 values")
    for name, (low, mid, high) in timed(updates(f.adamw_values), f.rounds).items():
        print(f"{name:36}{f'{mid:.1f} ({low:.1f} {high:.1f})':>24}")


if __name__ == "__main__":
    app.run(main)

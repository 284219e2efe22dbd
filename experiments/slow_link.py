"""What does a step cost where nodes are joined by a slow link, and what does ZeRO++ save there?

Run:
    python experiments/slow_link.py                        # as root; two nodes of two ranks, 100 Mbit/s and 1 Gbit/s
    python experiments/slow_link.py --micros=1,4,16 --chains=zero3,once --rounds=3
    python experiments/slow_link.py --layers=1 --width=64 --rates=1000 --rounds=1  # the smallest

How: two network namespaces are nodes, each with two gloo processes of one thread, joined by a veth pair whose rate
`tc tbf` limits. The processes hold every chain; a round visits each at each rate, so that noise hits all alike, and
ratios are taken within a round. Ranks meet over a second pair, so what the interface counts is what the chains send.
Parameters travel in bfloat16 and are multiplied in float32, because a CPU without bfloat16 instructions takes 50 times
as long for the product; plain DDP is float32.

    ddp       torch's DistributedDataParallel, gradients summed once an update
    zero3     fz.shard("local", fz.shard("node", grad, acc, tx)): 16 bits for parameters, 32 for sums across nodes
    zero3_16  the same with 16 bits for sums across nodes: the 3M of the paper, and what ratios are taken to
    hpz       fz.zeropp without quantising, gradients at every micro-batch
    each      fz.zeropp as in the paper: gradients cross nodes at every micro-batch
    once      fz.zeropp: they cross once an update
    across    the same, but that nothing is quantised within a node, where the link is fast

Expect:
    Bytes across nodes are the closed form to the byte, by the count and by the interface, whose framing is set aside:
    66 bytes a packet, and 48 in front of each message of gloo's. ZeRO++ is at least 3 times as fast as ZeRO-3 at 100
    Mbit/s.
Found:
    3.3 M parameters, 4 micro-batches, 5 rounds, nothing else on the two cores. MB that a node sends in an update by the
    interface, milliseconds that keep the link busy, CPU milliseconds of all ranks, the median update, and how many
    times faster than ZeRO-3 with 16-bit sums within a round (spread over rounds):
                  MB    link    CPU  100 Mbit/s                   1 Gbit/s
    ddp         19.7   1,578  1,083       2,090  2.02 (1.99-2.09)      562  2.07 (1.84-2.31)
    zero3       52.1   4,169  2,294       6,028  0.72 (0.66-0.72)    1,189  0.97 (0.93-1.07)
    zero3_16    39.0   3,117  2,072       4,220  1                   1,170  1
    hpz         16.4   1,316  1,709       2,075  2.03 (1.93-2.18)      980  1.25 (1.09-1.33)
    each         5.0     400  2,466       1,442  2.88 (2.75-3.03)    1,204  1.00 (0.85-1.05)
    once         2.5     199  2,329       1,374  3.09 (3.01-3.15)    1,069  1.14 (1.03-1.22)
    across       2.5     199  1,856       1,108  3.69 (3.51-4.28)      788  1.50 (1.33-1.53)
    The aim of 3 at 100 Mbit/s is reached. At 1 Gbit/s the arithmetic is what is left, and quantising within the node,
    which saves nothing on loopback, is what `once` takes more than `across`. Bytes: the count is the closed form
    exactly; the interface's payload is more by 368 to 35,000 bytes, at most 0.1 %. With 1, 4 and 16 micro-batches
    `each` sends 2.47, 4.97 and 14.96 MB, `once` 2.47 at all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpt
import torch
import torch.distributed as dist
import two_nodes
from absl import app, flags
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves, tree_map

import funczero as fz
from funczero import P

CHAINS = ("ddp", "zero3", "zero3_16", "hpz", "each", "once", "across")
BASE = "zero3_16"
MESH = {"node": 2, "local": 2}
F = flags.FLAGS
flags.DEFINE_list("rates", ["100", "1000"], "Million bits a second that the link takes, each way.")
flags.DEFINE_list("micros", ["4"], "Micro-batches an update, in each process.")
flags.DEFINE_list("chains", list(CHAINS), f"Which of {', '.join(CHAINS)}.")
flags.DEFINE_integer("layers", 4, "Blocks of the model.", lower_bound=1)
flags.DEFINE_integer("width", 256, "Features of a token; a multiple of 64.", lower_bound=64)
flags.DEFINE_integer("heads", 4, "Attention heads of a block.", lower_bound=1)
flags.DEFINE_integer("length", 8, "Bytes in a window; a micro-batch is one window.", lower_bound=1)
flags.DEFINE_integer("rounds", 7, "Visits of every chain at every rate.", lower_bound=1)
flags.DEFINE_integer("updates", 2, "Updates of a visit.", lower_bound=1)
flags.DEFINE_string("out", "runs/slow_link", "Folder for slow_link.png, found.json and what the ranks write to stderr.")


class Visit(NamedTuple):
    """A few updates of one chain at one rate; a cost is of one update."""

    micros: int
    chain: str
    rate: int
    round: int
    ms: float  # of the slowest rank
    cpu: float  # milliseconds of all ranks together
    interface: float  # bytes that left the first node
    packets: float


class Bytes(NamedTuple):
    """What the first node sends to the other in an update."""

    micros: int
    chain: str
    closed: int  # parameters and gradients, in closed form
    counted: int  # the same, as fz.count_bytes says; 0 for torch's own
    integers: int  # counted: the loss, the norm, and what ranks compare
    payload: int  # of the interface, without the headers of its packets
    unnamed: int  # payload that neither is: gloo's own headers
    packets: int
    interface: int  # all that the interface counts


# --- chains -----------------------------------------------------------------------------------------------------------
def loss_fn(params: dict, batch: dict, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """gpt.loss_fn, but that what is stored in 16 bits is multiplied in 32."""
    wide = partial(tree_map, lambda x: x.float())
    block = lambda p, x, angles: gpt.block(wide(p), x, angles)
    rest = wide({name: x for name, x in params.items() if name != "blocks"})
    x = torch.nn.functional.embedding(batch["x"], rest["embed"])
    x = fz.layers(block, params["blocks"], x, gpt.rotary(x.shape[1], x.shape[-1] // heads, x.device), remat=True)
    scores = torch.nn.functional.layer_norm(x, x.shape[-1:], rest["norm"]) @ rest["head"].T
    nll = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["y"].flatten(), reduction="sum")
    return nll, nll.new_tensor(batch["y"].numel())


def chain(name: str, k: int) -> tuple:
    """A chain of ours by name."""
    grad = fz.value_and_grad(partial(loss_fn, heads=F.heads), batch=P(("node", "local")), units=("blocks",))
    tx, acc, half = fz.adamw(1e-3), () if k == 1 else (fz.accumulate(k),), fz.cast("bfloat16")
    if name.startswith("zero3"):
        scatter = {"scatter": half} if name == "zero3_16" else {}
        return (fz.shard("local", fz.shard("node", grad, *acc, tx, **scatter)),)
    if name == "hpz":
        return fz.zeropp(grad, tx, weights=fz.as_born, gradients=(fz.as_born, half), accumulate=k, each=True)
    gradients = {"gradients": (fz.as_born, fz.int4(512))} if name == "across" else {}
    return fz.zeropp(grad, tx, accumulate=k, each=name == "each", **gradients)


class Ours:
    """A chain of ours and its state."""

    def __init__(self, name: str, k: int, params: dict) -> None:
        policy = "params=float32,compute=bfloat16,accumulate=float32"
        self.update = fz.donate(fz.train_step(*chain(name, k), mesh=MESH, policy=policy))
        self.state = self.update.init(params)

    def step(self, batch: dict) -> float:
        """One update over the global batch."""
        self.state, metrics = self.update(self.state, self.update.local_rows(batch))
        return metrics.loss.item()

    def count(self, batch: dict) -> dict[str, int]:
        """Bytes across nodes of one update: of parameters and gradients, and of the integers that ranks compare."""
        with fz.count_bytes(self.update) as sent:
            self.step(batch)
        across = {key: n for key, n in sent.items() if key[0] != "local"}
        values = sum(n for key, n in across.items() if key[1] != "all_reduce")
        return {"values": values, "integers": sum(across.values()) - values}


class DDP:
    """torch's own, on the same function."""

    def __init__(self, name: str, k: int, params: dict) -> None:
        leaves, self.spec = torch.utils._pytree.tree_flatten(params)
        module = torch.nn.Module()
        module.leaves = torch.nn.ParameterList([torch.nn.Parameter(x.clone()) for x in leaves])
        module.forward = lambda batch: self._loss(module.leaves, batch)
        self.module, self.k = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True), k
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def _loss(self, leaves: Any, batch: dict) -> torch.Tensor:
        nll, count = loss_fn(torch.utils._pytree.tree_unflatten(list(leaves), self.spec), batch, F.heads)
        return nll / count / self.k

    def step(self, batch: dict) -> float:
        """One update over this rank's rows."""
        own = {name: x.chunk(dist.get_world_size())[dist.get_rank()] for name, x in batch.items()}
        micros, loss = [{name: x[i : i + 1] for name, x in own.items()} for i in range(self.k)], 0.0
        for i, micro in enumerate(micros):
            with contextlib.nullcontext() if i + 1 == self.k else self.module.no_sync():
                part = self.module(micro)
                part.backward()
            loss += part.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def count(self, batch: dict) -> dict[str, int]:
        """Nobody counts torch's own messages."""
        self.step(batch)
        return {"values": 0, "integers": 0}


def closed_form(name: str, k: int) -> float:
    """Bytes of parameters and gradients that one node sends to the other in an update."""
    square = F.width * F.width // 4  # slots of one rank of four
    block = [F.width // 4, 3 * square, square, F.width // 4, 4 * square, 4 * square]
    rest = [256 * F.width // 4, F.width // 4, 256 * F.width // 4]
    units = [*[block] * F.layers, rest]
    if name == "ddp":  # a ring of four ranks passes a float32 gradient 2 x 3/4 times over every edge
        return 2 * 3 / 4 * 4 * 4 * sum(map(sum, units))

    def packed(unit: list[int], bits: int, size: int, scale: int) -> int:
        """Codes, and one scale for every block of every slot."""
        return sum(scale * -(-n // size) for n in unit) + -(-bits * sum(unit) // (8 * scale)) * scale

    half, int8, int4 = (lambda u: 2 * sum(u)), (lambda u: packed(u, 8, 2048, 2)), (lambda u: packed(u, 4, 512, 4))
    every = lambda form: sum(map(form, units))
    opened = 2 * F.layers * half(block) + half(rest)  # blocks are open in the forward and in the backward
    return (
        2
        * {  # of two ranks
            "zero3": k * (opened + 2 * every(half)),
            "zero3_16": k * (opened + every(half)),
            "hpz": every(half) + k * every(half),
            "each": every(int8) + k * every(int4),
            "once": every(int8) + every(int4),
            "across": every(int8) + every(int4),
        }[name]
    )


# --- a rank -----------------------------------------------------------------------------------------------------------
def rank() -> None:
    """Hold every chain, and do what is asked."""
    torch.set_num_threads(1)
    held, batches = {}, {}
    for question, answers in two_nodes.questions():
        if question["do"] == "build":
            fz.init_distributed()
            params = gpt.init(0, gpt.Sizes(F.layers, F.width, F.heads))
            for k, name in itertools.product(map(int, F.micros), F.chains):
                text = torch.randint(0, 256, (4 * k, F.length + 1), generator=torch.Generator().manual_seed(k))
                batches[k] = {"x": text[:, :-1].contiguous(), "y": text[:, 1:].contiguous()}
                held[name, k] = (DDP if name == "ddp" else Ours)(name, k, params)
            print(json.dumps(sum(x.numel() for x in tree_leaves(params))), file=answers)
            continue
        k = question["micros"]
        one, batch = held[question["chain"], k], batches[k]
        if question["do"] == "count":
            print(json.dumps(one.count(batch)), file=answers)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [one.step(batch) for _ in range(question["updates"])]
        cost = {"ms": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        answer = {name: 1e3 * x / len(losses) for name, x in cost.items()} | {"loss": losses[0]}
        print(json.dumps(answer), file=answers)
    os._exit(0)  # the script that asks has ended, and the nodes with it


# --- the script that asks ---------------------------------------------------------------------------------------------
def measure(nodes: tuple[two_nodes.Node, two_nodes.Node], say: Any) -> tuple[list[Visit], dict, int]:
    """Every visit; by (chain, micros) what was counted; how many parameters."""
    ranks = two_nodes.Ranks(nodes, 2, [sys.executable, *sys.orig_argv[1:]], Path(F.out))
    two_nodes.limit(nodes, 10_000)
    count = ranks.ask({"do": "build"})[0]
    say(f"{count:,} parameters on {' x '.join(f'{n} {axis}' for axis, n in MESH.items())}")
    counted, losses, out = {}, {}, []
    pairs = list(itertools.product(map(int, F.micros), F.chains))
    for k, name in pairs:
        one = {"chain": name, "micros": k}
        losses[name, k] = statistics.mean(a["loss"] for a in ranks.ask({"do": "run", "updates": 1} | one))
        found = ranks.ask({"do": "count"} | one)[:2]  # of the two ranks of the first node
        counted[name, k] = {what: sum(f[what] for f in found) for what in found[0]}
    for k in map(int, F.micros):
        own = [losses[name, k] for name in F.chains]
        assert max(own) - min(own) < 3e-2, f"the chains do not compute the same: {losses}"
    for number, rate in itertools.product(range(F.rounds), map(int, F.rates)):
        two_nodes.limit(nodes, rate)
        for k, name in pairs:
            before = nodes[0].sent()
            answers = ranks.ask({"do": "run", "chain": name, "micros": k, "updates": F.updates})
            sent = [(now - then) / F.updates for now, then in zip(nodes[0].sent(), before, strict=True)]
            costs = max(a["ms"] for a in answers), sum(a["cpu"] for a in answers)
            out.append(Visit(k, name, rate, number, *costs, *sent))
        say(f"round {number + 1} of {F.rounds} at {rate} Mbit/s")
    return out, counted, count


def spread(values: list[float]) -> str:
    """Median, and quartiles."""
    if len(values) < 2:
        return f"{values[0]:,.0f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def ratios(visits: list[Visit], k: int, rate: int, name: str) -> list[float]:
    """How many times as fast as ZeRO-3, by round; empty without a ZeRO-3."""
    ms = {(v.chain, v.round): v.ms for v in visits if (v.micros, v.rate) == (k, rate)}
    return [ms[BASE, r] / ms[name, r] for r in range(F.rounds) if (BASE, r) in ms]


def tables(visits: list[Visit], sent: list[Bytes], console: Console) -> None:
    """Times by rate, and bytes."""
    for k in map(int, F.micros):
        for rate in map(int, F.rates):
            table = Table("chain", title=f"{rate} Mbit/s, {k} micro-batches an update, {F.rounds} rounds")
            heads = (
                "ms an update (quartiles)",
                "fastest",
                f"times as fast as {BASE}",
                "link busy, ms",
                "CPU ms, all ranks",
            )
            for head in heads:
                table.add_column(head, justify="right")
            for name in F.chains:
                own = [v for v in visits if (v.micros, v.rate, v.chain) == (k, rate, name)]
                over = ratios(visits, k, rate, name)
                times = f"{statistics.median(over):.2f} ({min(over):.2f} to {max(over):.2f})" if over else "-"
                ms, cpu = [v.ms for v in own], statistics.median(v.cpu for v in own)
                busy = statistics.median(v.interface for v in own) * 8e-3 / rate
                table.add_row(name, spread(ms), f"{min(ms):,.0f}", times, f"{busy:,.0f}", f"{cpu:,.0f}")
            console.print(table)
        table = Table("chain", title=f"bytes that a node sends in an update, {k} micro-batches")
        for head in Bytes._fields[2:]:
            table.add_column(head, justify="right")
        for found in (f for f in sent if f.micros == k):
            table.add_row(found.chain, *(f"{n:,}" for n in found[2:]))
        console.print(table)


def bytes_of(name: str, k: int, visits: list[Visit], counted: dict[str, int]) -> Bytes:
    """Closed form, count and interface."""
    own = [v for v in visits if (v.micros, v.chain) == (k, name)]
    middle = min(own, key=lambda v: abs(v.interface - statistics.median_low([v.interface for v in own])))
    payload, closed = middle.interface - two_nodes.HEADER * middle.packets, round(closed_form(name, k))
    known = (counted["values"] or closed) + counted["integers"]
    ends = round(payload), round(payload - known), round(middle.packets), round(middle.interface)
    return Bytes(k, name, closed, counted["values"], counted["integers"], *ends)


def plot(visits: list[Visit], path: Path, title: str) -> str:
    """Step times and bytes as bars."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {path}: matplotlib is not installed; pip install matplotlib"
    figure = Figure(figsize=(4.5 * (1 + len(F.rates)), 3.5 * len(F.micros)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(F.micros), 1 + len(F.rates), squeeze=False)
    for row, k in zip(grid, map(int, F.micros), strict=True):
        for axes, rate in zip(row, map(int, F.rates), strict=False):
            own = [[v.ms / 1e3 for v in visits if (v.micros, v.rate, v.chain) == (k, rate, n)] for n in F.chains]
            middle = [statistics.median(x) for x in own]
            around = [[m - min(x) for m, x in zip(middle, own)], [max(x) - m for m, x in zip(middle, own)]]
            axes.bar(F.chains, middle, yerr=around, capsize=3)
            axes.set(ylabel="seconds an update", title=f"{rate} Mbit/s, {k} micro-batches")
        sizes = [statistics.median(v.interface for v in visits if (v.micros, v.chain) == (k, n)) for n in F.chains]
        row[-1].bar(F.chains, [n / 1e6 for n in sizes], color="gray")
        row[-1].set(ylabel="MB that a node sends in an update", title="on the interface")
    for axes in grid.flat:
        axes.tick_params(axis="x", rotation=30)
    figure.savefig(path, dpi=120)
    return f"{path} has the plot"


def checked() -> str:
    """What is wrong with the flags or this machine, as one sentence; '' where nothing is."""
    for name in ("rates", "micros"):
        if not F[name].value or not all(x.isdigit() and int(x) > 0 for x in F[name].value):
            return f"--{name}={','.join(F[name].value)} is no list of positive integers; write --{name}=1,4"
    unknown = [x for x in F.chains if x not in CHAINS]
    if unknown or not F.chains:
        return f"--chains={','.join(F.chains)} names no chain {unknown}; write some of {','.join(CHAINS)}"
    if F.width % 64 or F.width % (2 * F.heads):
        return f"--width={F.width} is no multiple of 64 and of 2 x --heads={F.heads}; write --width=256 --heads=4"
    return two_nodes.missing()


def main(argv: list[str]) -> None:
    """Make the nodes and drive the ranks in them, or be one of these."""
    if "RANK" in os.environ:
        return rank()
    wrong = f"{argv[1]!r} is not a flag; write --flag=value" if len(argv) > 1 else checked()
    if wrong:
        print(f"slow_link: {wrong}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))
    out, console = Path(F.out), Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 130)
    out.mkdir(parents=True, exist_ok=True)
    with two_nodes.two_nodes() as nodes:
        visits, counted, count = measure(nodes, console.print)
    sent = [bytes_of(name, k, visits, counted[name, k]) for k in map(int, F.micros) for name in F.chains]
    found = {"visits": [v._asdict() for v in visits], "bytes": [x._asdict() for x in sent]}
    (out / "found.json").write_text(json.dumps(found))
    tables(visits, sent, console)
    console.print(plot(visits, out / "slow_link.png", f"{count:,} parameters, two nodes of two ranks"))


if __name__ == "__main__":
    app.run(main)

"""Does a GPT learn as well when what crosses nodes is quantised, and which wires should one take?

Run:
    python experiments/zeropp_parity.py                             # all settings, three seeds; goes on where it ended
    python experiments/zeropp_parity.py --settings=none,int8/int4 --seeds=0 --updates=200
    python experiments/zeropp_parity.py --updates=0 --check=20      # virtual ranks against real ones, bit for bit

How: two nodes of two ranks, `fz.zeropp`, as virtual ranks of one process. Wires are pure functions, so ranks and seeds
are a leading dim of every tensor. Each rank's gradient is quantised as it leaves over "local", read, added, quantised
again over "node", read, added; new parameters are quantised where they cross nodes, and the next gradient is taken at
what was read. `--check` trains the same by `fz.train_step(*fz.zeropp(...))` on four ranks, as threads, and compares
losses, parameters and views, bit for bit. A GPT over bytes, 131,392 parameters, on Python's own library. Runs are
paired by seed: the same first parameters, the same batches.

Expect:
    int8 weights and int4 gradients within 0.25 % of unquantised; plain int4 weights visibly worse. bf16 wires show how
    far two runs drift apart that differ in next to nothing.
"""

import json
import sys
import time
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import gpt
import torch
import virtual_ranks as ranks
from absl import app, flags
from torch import Tensor
from virtual_ranks import SETTINGS, Setting

import funczero as fz

HELD_OUT = 2048  # windows
AIM = 0.25  # percent

FLAGS = flags.FLAGS
flags.DEFINE_integer("updates", 2000, "Updates a run; 0: none, for --check alone.", lower_bound=0)
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of parameters and batches.")
flags.DEFINE_list("settings", [], "Names of settings, as int8/int4 for weights/gradients; default: all.")
flags.DEFINE_integer(
    "check", 0, "Updates over which every setting is compared with real ranks; 0: none.", lower_bound=0
)
flags.DEFINE_integer("rows", 2, "Windows of text of a rank in an update.", lower_bound=1)
flags.DEFINE_integer("length", 32, "Bytes in a window.", lower_bound=1)
flags.DEFINE_float("lr", 3e-3, "Peak learning rate of AdamW; a half cosine takes it to a tenth.", lower_bound=0.0)
flags.DEFINE_string("out", "runs/zeropp_parity", "Folder for results.jsonl (a line a run) and parity.png.")


# --- runs -------------------------------------------------------------------------------------------------------------
def held_out(corpus: fz.data.Corpus, spec: Any, leaves: list[Tensor]) -> list[float]:
    """Every seed's bits per byte of the held-out text."""
    total, rows = 0.0, 64
    with torch.no_grad():
        for batch in fz.data.sample_batches(corpus, HELD_OUT // rows, rows, FLAGS.length):
            wide = {k: x.expand(len(leaves[0]), *x.shape).contiguous() for k, x in batch.items()}
            total += ranks.loss_fn(fz.tree.unflatten(leaves, spec), wide)[0].double()
    return (total / (HELD_OUT * FLAGS.length * log(2))).tolist()


def bits(how: Setting) -> tuple[float, float]:
    """Bits that a parameter and its gradient take across nodes, scales included."""
    slots = tuple(x.numel() // (ranks.NODES * ranks.RANKS) for x in fz.tree.leaves(gpt.init(0, ranks.SIZES)))
    weights, gradients = (form.wire.nbytes(slots, torch.float32) * 8 / sum(slots) for form in (how.weights, how.across))
    return weights, gradients


def train(name: str, seeds: tuple[int, ...], text: tuple[fz.data.Corpus, fz.data.Corpus]) -> list[dict]:
    """A line of results for every seed."""
    world, state = ranks.virtual(SETTINGS[name], run_of(), seeds)
    began = time.process_time()
    for now in range(FLAGS.updates):
        state, losses = ranks.update(world, state, ranks.stacked(text[0], world, now))
        if (now + 1) % max(1, FLAGS.updates // 8) == 0:
            said = ", ".join(f"{x:.4f}" for x in (losses / log(2)).tolist())
            print(f"{name}: update {now + 1}, bits per byte of the batches {said}", flush=True)
    cost = 1e3 * (time.process_time() - began) / FLAGS.updates / len(seeds)
    exported, seen = (held_out(text[1], world.spec, x) for x in (ranks.masters(state.train), state.views))
    run = {"setting": name, **run_of()._asdict(), "bits": bits(SETTINGS[name]), "cpu_ms": cost}
    return [{**run, "seed": seed, "loss": exported[s], "views": seen[s]} for s, seed in enumerate(seeds)]


def run_of() -> ranks.Run:
    """What makes runs comparable."""
    return ranks.Run(FLAGS.updates or FLAGS.check, FLAGS.rows, FLAGS.length, FLAGS.lr)


def results(path: Path) -> dict[str, dict[int, dict]]:
    """The runs that are done, by setting and seed.

    Raises:
      ValueError: a line is no result.
    """
    found: dict[str, dict[int, dict]] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            run = json.loads(line)
            if ranks.Run(*(run[name] for name in ranks.Run._fields)) == run_of():
                found.setdefault(run["setting"], {})[run["seed"]] = run
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is no result of this script; remove it") from None
    return found


# --- what they show ---------------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """One setting against unquantised: relative differences in percent, by seed."""

    name: str
    bits: tuple[float, float]
    loss: float  # bits per byte, mean over seeds
    exported: list[float]  # of the exact parameters
    views: list[float]  # of those that every rank reads


def rows_of(found: dict[str, dict[int, dict]], names: list[str], seeds: tuple[int, ...]) -> list[Row]:
    """Settings and seeds that were run, each paired with the unquantised run of its seed."""
    out, plain = [], found.get("none", {})
    for name in names:
        pairs = [(run, plain[s]["loss"]) for s, run in found.get(name, {}).items() if s in seeds and s in plain]
        if pairs:
            exported, views = ([100 * (r[k] / base - 1) for r, base in pairs] for k in ("loss", "views"))
            loss = sum(r["loss"] for r, _ in pairs) / len(pairs)
            out.append(Row(name, tuple(pairs[0][0]["bits"]), loss, exported, views))
    return out


def spread(xs: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    x = torch.tensor(xs, dtype=torch.float64)
    return f"{x.mean():+.2f}" + (f" +- {x.std():.2f}" if len(xs) > 1 else "")


def table(rows: list[Row]) -> str:
    """The table, and the setting of the fewest bits whose mean difference is within the aim."""
    lines = [
        f"{'weights/gradients':36}{'bits across nodes':>18}{'bits per byte':>15}{'exported, %':>16}{'views, %':>16}  by"
        " seed, %"
    ]
    for r in rows:
        seeds = " ".join(f"{x:+.2f}" for x in r.exported)
        kinds = f"{r.bits[0]:.2f} + {r.bits[1]:.2f}"
        lines.append(f"{r.name:36}{kinds:>18}{r.loss:15.4f}{spread(r.exported):>16}{spread(r.views):>16}  {seeds}")
    mean = lambda xs: sum(xs) / len(xs)
    good = [r for r in rows if max(mean(r.exported), mean(r.views)) <= AIM]
    best = min(good, key=lambda r: (sum(r.bits), mean(r.views)), default=None)
    lines.append(f"fewest bits with means of at most {AIM} %: {best.name if best else 'none'}")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Differences by seed, over the bits that cross nodes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"no {path.name}: matplotlib is not installed; pip install matplotlib")
    axes = Figure(figsize=(10, 6), layout="constrained").add_subplot(
        xlabel="held-out loss against unquantised, % (exported: dots, views: crosses)",
        title="ZeRO++, 2 nodes of 2 ranks",
    )
    for y, row in enumerate(reversed(rows)):
        axes.plot(row.exported, [y] * len(row.exported), "o", color="tab:blue", alpha=0.7)
        axes.plot(row.views, [y] * len(row.views), "x", color="tab:orange")
    axes.set_yticks(range(len(rows)), [f"{r.name} ({sum(r.bits):.1f} bits)" for r in reversed(rows)])
    axes.axvline(0, color="gray", linewidth=1)
    axes.axvline(AIM, color="gray", linestyle="--", linewidth=1)
    axes.figure.savefig(path, dpi=120)


def chosen() -> tuple[list[str], tuple[int, ...]]:
    """Settings and seeds of this command line.

    Raises:
      ValueError: one that is none, or that is there twice.
    """
    names = FLAGS.settings or list(SETTINGS)
    for name in names:
        if name not in SETTINGS:
            raise ValueError(f"--settings: {name!r} is none; write some of {', '.join(map(repr, SETTINGS))}")
    if not FLAGS.seeds or not all(s.isdecimal() for s in FLAGS.seeds):
        raise ValueError(f"--seeds={','.join(FLAGS.seeds)} are no seeds; write numbers from 0 on, as 0,1,2")
    if not FLAGS.updates and not FLAGS.check:
        raise ValueError("--updates=0 and --check=0 leave nothing to do; write one of them")
    seeds = tuple(map(int, FLAGS.seeds))
    for what, xs in (("settings", names), ("seeds", seeds)):
        if len(set(xs)) < len(xs):
            raise ValueError(f"--{what} names one twice; write each once")
    return names, seeds


def main(argv: list[str]) -> None:
    """Check, train what is missing, show what is there."""
    try:
        if len(argv) > 1:
            raise ValueError(f"{argv[1]!r} is not a flag; write --flag=value, or --help for the list")
        (names, seeds), text, path = chosen(), fz.data.load(), Path(FLAGS.out, "results.jsonl")
        for corpus in text:
            fz.data.batch(corpus, 0, 0, 1, FLAGS.length)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = results(path)
    except (ValueError, OSError) as error:
        sys.exit(f"zeropp_parity: {error}")
    for name in names if FLAGS.check else ():
        wrong = ranks.differs(SETTINGS[name], run_of(), seeds, FLAGS.check, text[0])
        print(
            f"{name}: {FLAGS.check} updates of virtual and real ranks"
            f" {f'differ in {wrong}' if wrong else 'have the same bits'}",
            flush=True,
        )
        if wrong:
            sys.exit(1)
    for name in names if FLAGS.updates else ():
        missing = tuple(s for s in seeds if s not in found.get(name, {}))
        if missing:
            lines = train(name, missing, text)
            with path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
    if FLAGS.updates:
        found = results(path)
        if lacking := [seed for seed in seeds if seed not in found.get("none", {})]:
            print(f"no unquantised run of seeds {lacking} to compare with; add none to --settings")
        rows = rows_of(found, names, seeds)
        print(table(rows))
        plot(rows, path.parent / "parity.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    app.run(main)

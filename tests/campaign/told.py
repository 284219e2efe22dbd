"""Do ranks that go apart always hear of it? Random pairs of ranks that differ in one thing, at random updates and
stages.

Run: python tests/campaign/told.py --runs=200 --seed=0 [--kind=eval --stage=3 --at=500 --check=1]
Expect: every run ends on both ranks within LIMIT seconds of going apart, with one sentence or with the right value; 0
silent, 0 raw messages of gloo, 0 aborts, 0 hangs.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from campaign import apart

LIMIT = 10.0  # seconds from going apart to the end of every process
flags.DEFINE_integer("runs", 20, "Worlds of two ranks.")
flags.DEFINE_integer("seed", 0, "Of the draws.")
flags.DEFINE_integer("at", -1, "The update at which a rank goes apart; drawn if negative.")
flags.DEFINE_integer("stage", -1, "Drawn if negative.")
flags.DEFINE_integer("check", 1, "train_step's.")
flags.DEFINE_string("kind", "", "What goes apart; drawn if empty.")


class End(NamedTuple):
    """How one rank ended."""

    code: int
    out: str
    err: str
    seconds: float  # after going apart; nan where it never did


def run(kind: str, stage: int, at: int, check: int, patience: float = 60.0) -> list[End]:
    """A world of two ranks, as real processes with stderr kept."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        files = [[open(Path(folder, f"{r}.{name}"), "w+") for name in ("out", "err")] for r in range(2)]
        ranks = []
        for r in range(2):
            env = {
                **os.environ,
                "RANK": str(r),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(r),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
            command = [sys.executable, apart.__file__, kind, str(stage), str(at), str(check)]
            ranks.append(subprocess.Popen(command, env=env, stdout=files[r][0], stderr=files[r][1], text=True))
        ended: dict[int, float] = {}
        until = time.monotonic() + 120 + patience
        while len(ended) < 2 and time.monotonic() < until:
            now = time.time()
            ended |= {r: now for r, p in enumerate(ranks) if r not in ended and p.poll() is not None}
            time.sleep(0.02)
            if len(ended) == 1 and patience and now - min(ended.values()) > patience:
                break
        for p in ranks:
            if p.poll() is None:
                p.kill()
            p.wait()
        texts = []
        for pair in files:
            for f in pair:
                f.flush()
                f.seek(0)
            texts.append([f.read() for f in pair])
            for f in pair:
                f.close()
    return ends_of([(p.returncode, *texts[r], ended.get(r, float("inf"))) for r, p in enumerate(ranks)])


def ends_of(ranks: list[tuple[int, str, str, float]]) -> list[End]:
    """From each rank's exit code, stdout, stderr, and when it ended."""
    went = [float(m.group(1)) for _, out, _, _ in ranks if (m := re.search(r"apart ([\d.]+)", out))]
    return [End(code, out, err, when - max(went) if went else float("nan")) for code, out, err, when in ranks]


def sentence(err: str) -> str:
    """What a rank was told; "" where nothing was."""
    found = re.findall(r"^(?:\[rank\d\]: )?(?:funczero(?:\.world\.ledger\.DivergenceError)?): (rank .*)$", err, re.M)
    return re.sub(r" \(this rank is at .*\)$", "", found[-1]) if found else ""


def verdict(kind: str, stage: int, at: int, ends: list[End]) -> str:
    """told, right, or what is wrong with this run."""
    if any(e.seconds == float("inf") for e in ends):
        return "HANG"
    if any(e.code < 0 for e in ends):
        return f"SIGNAL {min(e.code for e in ends)}"
    if any("terminate called" in e.err or "gloo::" in e.err for e in ends):
        return "RAW"
    losses = [float(m.group(1)) for e in ends if (m := re.search(r"end ([-\d.e+]+)", e.out))]
    if all(e.code == 0 for e in ends):
        want = apart.reference(kind, at)
        right = kind in apart.RIGHT or stage in apart.STAGES.get(kind, ())
        return (
            "right"
            if right and len(losses) == 2 and all(abs(x - want) < 1e-4 * abs(want) for x in losses)
            else "SILENT"
        )
    said = [sentence(e.err) for e in ends]
    own = kind == "error"  # an error of one's own needs no sentence on that rank
    if not all(s or own and "bad sample" in e.err for s, e in zip(said, ends)):
        return "UNTOLD"
    if not all(e.code == 1 for e in ends):
        return f"CODES {[e.code for e in ends]}"
    return "told" if max(e.seconds for e in ends) < LIMIT else "LATE"


def main(_: list[str]) -> None:
    import random

    o, draw = flags.FLAGS, random.Random(flags.FLAGS.seed)
    table: Counter = Counter()
    seconds = []
    for i in range(o.runs):
        kind = o.kind or draw.choice(apart.KINDS)
        stage = draw.choice(range(4)) if o.stage < 0 else o.stage
        at = draw.choice((1, 3, draw.randrange(4, 60), 500)) if o.at < 0 else o.at
        ends = run(kind, stage, at, o.check)
        found = verdict(kind, stage, at, ends)
        table[kind, found] += 1
        if found == "told":
            seconds.append(max(e.seconds for e in ends))
        print(
            f"{i:4d} {kind:7s} stage {stage} at {at:3d}: {found:8s} {max(e.seconds for e in ends):5.1f} s "
            f" {sentence(ends[0].err)[:150]}",
            flush=True,
        )
        if found not in ("told", "right"):
            print(
                "\n".join(f"--- rank {r}: code {e.code}\n{e.out[-300:]}\n{e.err[-3000:]}" for r, e in enumerate(ends)),
                flush=True,
            )
    kinds, ways = sorted({k for k, _ in table}), sorted({w for _, w in table})
    print(f"{'':8s}", *(f"{w:>10s}" for w in ways))
    for k in kinds:
        print(f"{k:8s}", *(f"{table[k, w]:10d}" for w in ways))
    seconds.sort()
    if seconds:
        print(f"seconds to the end: median {seconds[len(seconds) // 2]:.1f}, largest {seconds[-1]:.1f}")


if __name__ == "__main__":
    app.run(main)

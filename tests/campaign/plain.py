"""Does a plain run ever die? Stage 1, two processes, check=0, nothing raised: one of about 100 such runs once ended
with SIGABRT in its first steps.

Run: python tests/campaign/plain.py --runs=1000 --updates=8 --millions=26 [--stage=1 --keep=FOLDER]
Expect: all exit codes 0. A run that ends otherwise is reported with its signal, and its stderr is kept (with glibc's
and faulthandler's words).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from absl import app, flags

flags.DEFINE_integer("runs", 30, "Worlds of two processes, one after another.")
flags.DEFINE_integer("updates", 8, "Updates a run.")
flags.DEFINE_float("millions", 26, "Parameters, in millions.")
flags.DEFINE_integer("stage", 1, "ZeRO stage.")
flags.DEFINE_string("keep", "", "Folder for the stderr of runs that failed; by default the one you are in.")
flags.DEFINE_bool("worker", False, "One rank of a run; set by the script itself.")


def worker(updates: int, millions: float, stage: int) -> None:
    """A run like bench_step's: blocks as units, AdamW, a clip, in place."""
    import faulthandler

    import torch
    import torch.nn.functional as F

    import funczero as fz

    faulthandler.enable()
    torch.set_num_threads(1)
    width = int((millions * 1e6 / 8 / 8) ** 0.5) // 16 * 16
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g) / width
    params = {"blocks": [{"up": draw(width, 4 * width), "down": draw(4 * width, width)} for _ in range(8)]}

    def loss_fn(p, b):
        x = fz.layers(lambda q, x: x + F.gelu(x @ q["up"]) @ q["down"], p["blocks"], b["x"])
        return F.mse_loss(x, b["x"].roll(1, 0), reduction="sum"), torch.tensor(float(len(x)))

    grad = fz.value_and_grad(loss_fn, batch=fz.P("data"), units=("blocks",))
    step = fz.donate(
        fz.train_step(
            *fz.zero(grad, fz.clip_by_global_norm(1.0), fz.adamw(1e-3), stage=stage), mesh={"data": -1}, check=0
        )
    )
    state = step.init(params)
    for t in range(updates):
        state, m = step(
            state, step.local_rows({"x": torch.randn(32, width, generator=torch.Generator().manual_seed(t))})
        )
    print("end", m.loss.item(), flush=True)


def world(command: list[str]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and errors of two ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "LIBC_FATAL_STDERR_": "1",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
    }
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), env.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    texts = [p.communicate(timeout=600) for p in ranks]
    return [p.returncode for p in ranks], [t[0] for t in texts], [t[1] for t in texts]


def main(_: list[str]) -> None:
    o, ends = flags.FLAGS, Counter()
    if o.worker:
        return worker(o.updates, o.millions, o.stage)
    losses, start = set(), time.monotonic()
    for i in range(o.runs):
        codes, outs, errs = world([sys.executable, *sys.argv, "--worker"])
        said = " ".join(signal.Signals(-c).name if c < 0 else str(c) for c in codes)
        ends[said] += 1
        losses |= {out.strip() for out in outs}
        if codes != [0, 0]:
            for r, err in enumerate(errs):
                Path(o.keep or ".", f"plain-{os.getpid()}-{i}-rank{r}.err").write_text(err)
            print(f"run {i}: {said}; stderr of both ranks is kept\n{errs[0][-1500:]}\n{errs[1][-1500:]}", flush=True)
        if i % 10 == 9 or codes != [0, 0]:
            print(f"{i + 1} runs, {time.monotonic() - start:.0f} s: {dict(ends)}", flush=True)
    print(f"{o.runs} runs, {time.monotonic() - start:.0f} s, exit codes {dict(ends)}, {len(losses)} different ends")


if __name__ == "__main__":
    app.run(main)

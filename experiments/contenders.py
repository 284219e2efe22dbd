"""Contenders of an experiment: a script starts itself once for each, in processes of its own, and compares them.

A script's `contend(name)` gives what one has measured, as JSON: size (parameters), step (seconds), peak (bytes over the
imports), losses, bits (a byte).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

flags.DEFINE_list("contenders", ["ddp", "0", "1", "2", "3"], "Contenders: ddp, ZeRO stages, and what a script knows.")
flags.DEFINE_string("contender", "", "Be this contender, in the world of the launcher.")
flags.DEFINE_string("out", "", "The file in which a contender leaves what it measured.")
flags.DEFINE_integer("world", 2, "Processes.")
flags.DEFINE_integer("rounds", 2, "Lives of every contender.")
flags.DEFINE_integer("steps", 40, "Updates.")
flags.DEFINE_integer("rows", 8, "Rows of an update on all ranks, in two micro-batches.")
flags.DEFINE_integer("length", 128, "Bytes of a row.")
flags.DEFINE_integer("width", 256, "Of the model.")
flags.DEFINE_integer("layers", 4, "Of the model.")
F = flags.FLAGS


def torchrun() -> list[str]:
    """The command before a script."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={F.world}", "--standalone"]


def run(script: str, contend: Callable[[str], dict[str, Any]], launch: Callable[[str], Sequence[str]]) -> None:
    """Contend, or start all contenders and print the table.

    Args:
      script: its file.
      contend: what a contender measures, in the world of its launcher.
      launch: a contender's name -> the command before the script.
    """
    if F.contender:
        found = contend(F.contender)
        if F.out and int(os.environ.get("RANK", "0")) == 0:
            Path(F.out).write_text(json.dumps(found))
        return
    lives: dict[str, list[dict[str, Any]]] = {name: [] for name in F.contenders}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(F.rounds):
            for name in F.contenders:
                lives[name].append(
                    _started(Path(script).resolve(), name, launch(name), Path(folder, f"{name}-{i}.json"))
                )
    _print(lives)


def _started(script: Path, name: str, launch: Sequence[str], out: Path) -> dict[str, Any]:
    """A contender's life in processes of its own."""
    own = [str(script), f"--contender={name}", f"--out={out}"]
    own += [f"--{n}={F[n].value}" for n in ("steps", "rows", "length", "width", "layers")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(script.parent.parent), os.environ.get("PYTHONPATH"))))
    subprocess.run([*launch, *own], env=env, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def _print(lives: dict[str, list[dict[str, Any]]]) -> None:
    first = lives[F.contenders[0]][0]
    table = Table(
        "", "ms a step", "ratio", "MiB over imports", "first loss", "last loss", "bits a byte", "furthest loss"
    )
    fastest = {name: min(x["step"] for x in found) for name, found in lives.items()}
    for name, found in lives.items():
        x = found[0]
        far = max(abs(a / b - 1) for y in found for a, b in zip(y["losses"], first["losses"], strict=True))
        table.add_row(
            f"stage {name}" if name.isdigit() else name, f"{1e3 * fastest[name]:.0f}",
            f"{fastest[name] / fastest[F.contenders[0]]:.2f}", f"{min(y['peak'] for y in found) / 2**20:.0f}",
            f"{x['losses'][0]:.4f}", f"{x['losses'][-1]:.4f}", f"{x['bits']:.4f}", f"{far:.0e}",
        )  # fmt: skip
    Console(width=120).print(f"{first['size']:,} parameters, {F.world} processes, {F.steps} updates", table)

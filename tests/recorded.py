"""Folders of runs, written as fz.experiment writes them, for what reads them."""

from __future__ import annotations

import json
from pathlib import Path

BEGIN = {
    "kind": "begin",
    "time": 1.7e9,
    "update": 0,
    "before": "",
    "form": 1,
    "script": "tiny",
    "steps": 40,
    "unit": "rows",
    "amount": 8.0,
    "chain": "train_step on data=2",
    "about": "",
    "mesh": {"data": 2},
    "brackets": ["data"],
    "edges": {"data": ""},
    "policy": "params=float32",
    "parameters": 3,
    "flags": {"lr": [0.1, True], "out": ["runs/a", True], "seed": [0, False]},
    "environment": {"torch": "2.11", "world": 2},
}
SENT = [["data", "all_gather", "float32", 100], ["data", "all_reduce", "int64", 20]]
PLAN = {
    "sent": SENT,
    "memory": {"masters": 6, "peak": 30, "at_peak": {"masters": 6, "activations": 24}},
    "flops": 10,
    "rank": 0,
    "notes": [],
    "seconds": 0.1,
}


def update(n, **other):
    """The line of an update."""
    line = {
        "step": n,
        "loss": 4 / (n + 1),
        "rows_per_second": 100.0 + n,
        "bytes_sent": 120,
        "lr": 0.1,
        "grad_norm": 1.0,
    }
    return {**line, "ok": True, "scale": 1024.0, **other}


def folder(path: Path, updates=40, lines=(), events=(), begin=None, plan=PLAN, odd=None) -> Path:
    """A run's folder.

    Args:
      lines: more lines of metrics.jsonl.
      events: more lines of run.jsonl.
      begin: what its first line says otherwise.
      odd: by update, what its line says otherwise.
    """
    path.mkdir(parents=True, exist_ok=True)
    odd = odd or {}
    log = [{"step": 0, "held": 0.5}, *(update(n, **odd.get(n, {})) for n in range(1, updates + 1)), *lines]
    own = [BEGIN | (begin or {}), {"kind": "state", "time": 1.7e9, "bytes": {"masters": 6}}]
    own += [{"kind": "sent", "time": 1.7e9, "update": 1, "bytes": SENT}, *events]
    for name, every in (("metrics.jsonl", log), ("run.jsonl", own)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in every))
    if plan is not None:
        (path / "plan.json").write_text(json.dumps(plan))
    return path

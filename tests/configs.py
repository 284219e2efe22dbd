"""Configs for tests: the page's own, one key in its place, and the keys that stand free of an optimizer."""

from __future__ import annotations

from funczero import deepspeed as ds

PAGE = {
    "train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
    "fp16": {"enabled": True}, "zero_optimization": True,
}  # fmt: skip


def resolve(world=2, auto=None, **keys):
    return ds.resolve({"train_batch_size": 8, **keys}, world, auto)


def place(path, value):
    """{"a": {"b": value}} of "a.b"."""
    *blocks, last = path.split(".")
    out = {last: value}
    for b in reversed(blocks):
        out = {b: out}
    return out


def in_force(path, value):
    """The same in a config that reads the key: of fp16 only where that is on."""
    out = place(path, value)
    if path.startswith("fp16."):
        out["fp16"].setdefault("enabled", True)
    return out


FREE = {k: v for k, v in ds.KEYS.items() if "." not in k or k.split(".")[0] not in ("optimizer", "scheduler")}

"""A resolved config as a value: every key that exists, with where its value came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from funczero.deepspeed.config.triad import Triad, WorldSize

DTYPES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


class Setting(NamedTuple):
    """A key's value and its origin: file, default, auto, derived, or the old spelling it was given under."""

    value: Any
    origin: str
    line: int | None = None


class Config(NamedTuple):
    """A resolved config: every key that exists, dotted, with its value."""

    name: str
    values: dict[str, Setting]
    world: WorldSize
    triad: Triad
    notes: tuple[str, ...]  # what was accepted without effect, one sentence each
    mesh: Mapping[str, int] | None = None  # how the ranks lie; None: all on one axis

    def value(self, path: str) -> Any:
        """The value of a key by its dotted path, as config.value("zero_optimization.stage")."""
        return self.values[path].value

    def block(self, prefix: str) -> dict[str, Any]:
        """The values of one block by their last names."""
        return {path[len(prefix) + 1 :]: v.value for path, v in self.values.items() if path.startswith(prefix + ".")}

    def nested(self) -> dict[str, Any]:
        """Every value in blocks, as a file has them."""
        out: dict[str, Any] = {}
        for path, v in self.values.items():
            *blocks, last = path.split(".")
            inside = out
            for name in blocks:
                inside = inside.setdefault(name, {})
            inside[last] = v.value
        return out

    def where(self, path: str) -> str:
        """The beginning of a message about a key."""
        line = self.values[path].line if path in self.values else None
        return f"{self.name}{f':{line}' if line else ''}: {path}: "

    @property
    def compute(self) -> str:
        """The dtype of forward and backward."""
        return "float16" if self.value("fp16.enabled") else "bfloat16" if self.value("bf16.enabled") else "float32"

    @property
    def policy(self) -> str:
        """The policy's string: float32 masters, sums in float32 unless data_types.grad_accum_dtype says otherwise."""
        wide = dtype_name(self.value("data_types.grad_accum_dtype")) or "float32"
        return f"params=float32,compute={self.compute},accumulate={wide}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What `train_step` needs beside the chain: train_step(*chain, **config.arguments)."""
        mesh = self.mesh or {"data": self.world.size}
        return {"mesh": mesh, "policy": self.policy, "sums": self.value("funczero.sums")}


def dtype_name(text: str | None) -> str | None:
    """torch's name of a dtype in any of DeepSpeed's spellings."""
    return None if text is None else DTYPES.get(text.removeprefix("torch."), text.removeprefix("torch."))

"""Dtypes as one readable string: one master, many views."""

from __future__ import annotations

from typing import NamedTuple

import torch

from funczero.core.number import dtype_name

_NAMES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_SHORT = {
    "f64": "float64",
    "fp64": "float64",
    "f32": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
}


def dtype_of(name: str | torch.dtype, who: str = "policy") -> torch.dtype:
    """A dtype of training by any of its names; `who` asks."""
    text = str(name).removeprefix("torch.")
    dtype = _NAMES.get(_SHORT.get(text, text))
    if dtype is None:
        raise ValueError(f"{who}: {name!r} is not a dtype of training; write one of {', '.join(_NAMES)}")
    return dtype


class Policy(NamedTuple):
    """Masters in `params`, forward and backward in `compute`, sums of gradients in `accumulate`.

    A gradient travels in the dtype it was born in until it is first summed, then in `accumulate`: nothing is rounded
    twice.

    >>> print(Policy.parse("params=float32,compute=bfloat16"))
    params=float32,compute=bfloat16,accumulate=float32
    >>> print(Policy.parse("float64"))
    params=float64,compute=float64,accumulate=float64
    """

    params: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    accumulate: torch.dtype = torch.float32

    @staticmethod
    def parse(text: str | Policy | None) -> Policy:
        """A policy from its string: `name=dtype,...`, or one dtype for all three; missing names are float32."""
        if text is None or isinstance(text, Policy):
            return text or Policy()
        if "=" not in text:
            return Policy(*[dtype_of(text)] * 3)
        given = dict(part.strip().split("=", 1) for part in text.split(",") if part.strip())
        unknown = set(given) - set(Policy._fields)
        if unknown:
            raise ValueError(
                f"policy: {sorted(unknown)[0]!r} is not a part of a policy; write"
                f" {','.join(f + '=...' for f in Policy._fields)}"
            )
        return Policy(**{name: dtype_of(value.strip()) for name, value in given.items()})

    def __str__(self) -> str:
        return ",".join(f"{name}={dtype_name(dtype)}" for name, dtype in zip(self._fields, self, strict=True))

"""What turns a segment into a callable: torch's inductor, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.gradients.recording import NotCaptured
from funczero.gradients.segments import Segment

MODES = ("inductor", "graph")
# cpp_wrapper: a call is one call into C++. fallback_random: draws are torch's own, from its generator, in their order.
SETTINGS: dict[str, Any] = {"cpp_wrapper": True, "fallback_random": True, "compile_threads": 1}


def compiler(mode: str) -> Callable[[Segment], Any]:
    """Segment -> (tensors) -> tensors."""
    return _compiled if mode == "inductor" else lambda segment: segment.run


def _compiled(segment: Segment) -> Callable[..., Sequence[Tensor]]:
    """By inductor.

    Raises:
      NotCaptured: with the compiler's own words.
    """
    of = [n.meta["val"] for n in segment.run.graph.nodes if n.op == "placeholder"]
    ends = next(n for n in segment.run.graph.nodes if n.op == "output").args[0]
    outs = [n.meta["val"] for n in ends]
    try:
        import torch._inductor
        import torch._inductor.config as config

        given: Any = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in of]
        with config.patch(**SETTINGS), torch.no_grad():
            fast = torch._inductor.compile(segment.run, given)
    except Exception as error:  # a compiler's own errors are of many kinds
        first = str(error).strip().splitlines()
        raise NotCaptured(f"its code does not compile: {type(error).__name__}: {first[0] if first else ''}") from error
    return _as_said(fast, [None if 0 in x.stride() else x.stride() for x in outs])


def _as_said(
    fast: Callable[..., Sequence[Tensor]], strides: list[tuple[int, ...] | None]
) -> Callable[..., Sequence[Tensor]]:
    """Outputs laid out in memory as they were recorded, as what is compiled to read them was told.

    Args:
      strides: None for an expanded one, which is a view, and so no other segment reads it.
    """

    def checked(*given: Tensor) -> Sequence[Tensor]:
        out = fast(*given)
        return [
            (
                x
                if s is None or x.stride() == s
                else torch.empty_strided(x.shape, s, dtype=x.dtype, device=x.device).copy_(x)
            )
            for x, s in zip(out, strides, strict=True)
        ]

    return checked

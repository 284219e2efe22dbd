"""The number of applied updates: where it begins, how schedules count in float64, and formulas that keep no more of
their state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree

COUNTED = 2**24  # applied updates that a float32 count tells apart


class Count(Tensor):
    """A 0-d int64 count whose arithmetic goes on in float64, where plain torch would round to float32.

    >>> (torch.tensor(1).as_subclass(Count) * 0.1).item(), (torch.tensor(1) * 0.1).item()
    (0.1, 0.10000000149011612)
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whole numbers stay counts; what would become the default dtype is computed from float64."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, Tensor):
                return out
            if out.dtype == torch.int64 and not out.dim():
                return out.as_subclass(cls)
            if out.dtype == torch.get_default_dtype():
                args, kwargs = tree.map(
                    lambda x: x.as_subclass(Tensor).double() if isinstance(x, Count) else x, (args, kwargs or {})
                )
                out = func(*args, **kwargs)
            return out.as_subclass(Tensor)


class Scalars(NamedTuple):
    """What most formulas take beside the leaves."""

    ok: Tensor
    factor: Tensor  # to be multiplied into the gradient
    rates: dict[str, Any]

    def of(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The factor and zero, in the gradients' dtype."""
        factor = self.factor.to(grads[0].dtype) if grads else self.factor
        return factor, factor.new_zeros(())


def counted(state: Any, now: list[dict[str, Any]], factor: Tensor, ok: Tensor) -> tuple[Any, list[Scalars]]:
    """`scalars` of a formula that needs no more of its state than the number of applied updates."""
    return state._replace(count=state.count + ok), [Scalars(ok, factor, each) for each in now]


def zero(params: Any) -> Tensor:
    """The number of applied updates at the start, where the parameters lie."""
    leaf = next(iter(tree.tensors(params)), torch.zeros(()))
    return torch.zeros((), dtype=torch.float32, device=leaf.device)

"""A parameter inside a unit, before the unit is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from funczero.core import tree

if TYPE_CHECKING:
    from funczero.gradients.parts import Parts
    from funczero.gradients.tape import Tape


class Ref:
    """A parameter inside a unit, before the unit is opened: it has a shape and a dtype, and no values."""

    def __init__(self, tape: Tape | Parts, leaf: int) -> None:
        """Leaf number `leaf` of what the tape holds."""
        info = tape.whole.structure.leaves[leaf]
        self.tape, self.leaf, self.unit, self.path = tape, leaf, info.unit, info.path
        self.shape, self.dtype, self.device = torch.Size(info.shape), tape.dtype, tape.device
        self.requires_grad = tape.differentiate and not tape.whole.structure.frozen(leaf)

    def is_floating_point(self) -> bool:
        """Modules ask their parameters for a dtype."""
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Any use as a tensor is refused, with the correction."""
        ref = next(x for x in tree.leaves((args, kwargs)) if isinstance(x, Ref))
        ref._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        """No tensor method exists here."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> NoReturn:
        again = (
            torch._C._current_graph_task_id() != -1
        )  # a backward reads it: something inside the block runs once more
        remedy = "run its blocks with fz.layers(block, params[...], x) or open it with fz.gather(params[...])"
        if "/" not in self.path:  # a module's parameter
            remedy = (
                "a module may read it only inside that block's forward; "
                "leave its list out of fz.stateless(..., units=[...])"
            )
        if again:
            remedy = (
                "it is read again in the backward, as torch.utils.checkpoint does inside a unit; "
                "leave that out, and write remat=True"
            )
        raise TypeError(f"parameter {self.path!r} is inside a unit that is not open; {remedy}")

    def __repr__(self) -> str:
        return f"<closed parameter {self.path!r} {tuple(self.shape)} {self.dtype}>"


@contextmanager
def opened_first() -> Iterator[None]:
    """A loss that hands closed parameters to a transform of torch.func is told what to write.

    Raises:
      TypeError: in place of torch's error, which speaks of a Ref.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        if "Ref'" not in str(error):
            raise
        why = "the loss hands parameters inside a unit, which is not open, to a transform of torch.func"
        remedy = "open them first, as torch.func.grad(inner)(fz.gather(params)), or leave out units"
        raise TypeError(f"value_and_grad: {why}; {remedy}") from error

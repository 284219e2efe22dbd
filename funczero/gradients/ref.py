"""A parameter inside a unit, before the unit is opened; in a backward, of which a part of its block runs again, its
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from funczero.core import tree
from funczero.gradients.course import again

if TYPE_CHECKING:
    from funczero.gradients.parts import Parts
    from funczero.gradients.recording import Recording
    from funczero.gradients.tape import Tape


class Ref:
    """A parameter inside a unit, before the unit is opened: it has a shape and a dtype, and no values.

    What torch.utils.checkpoint runs again inside a block, it runs in the backward, when the block has let its
    parameters go. There a Ref stands for the leaf of the unit that the backward has opened.
    """

    def __init__(self, tape: Tape | Parts | Recording, leaf: int) -> None:
        """Leaf number `leaf` of what the tape holds."""
        self.tape, self.leaf = tape, leaf

    @property
    def unit(self) -> int:
        """In which it lies."""
        return self.tape.whole.structure.leaves[self.leaf].unit

    @property
    def path(self) -> str:
        """Its first name."""
        return self.tape.whole.structure.leaves[self.leaf].path

    @property
    def shape(self) -> torch.Size:
        """Of the whole leaf."""
        return torch.Size(self.tape.whole.structure.leaves[self.leaf].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of all that is opened."""
        return self.tape.dtype

    @property
    def device(self) -> torch.device:
        """Of all that is opened."""
        return self.tape.device

    @property
    def requires_grad(self) -> bool:
        """Does it learn in this forward?"""
        return self.tape.differentiate and not self.tape.whole.structure.frozen(self.leaf)

    def is_floating_point(self) -> bool:
        """Modules ask their parameters for a dtype."""
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any use as a tensor is refused, with the correction; in a backward it is one of the leaf."""
        args, kwargs = tree.map(lambda x: x._opened() if isinstance(x, Ref) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """No tensor method exists here, but in a backward."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._opened(), name)

    def _opened(self) -> Tensor:
        found = self.tape.reopened(self.leaf) if again() else None
        if found is None:
            self._refuse()
        return found

    def _refuse(self) -> NoReturn:
        remedy = "run its blocks with fz.layers(block, params[...], x) or open it with fz.gather(params[...])"
        if "/" not in self.path:  # a module's parameter
            remedy = (
                "a module may read it only inside that block's forward; "
                "leave its list out of fz.stateless(..., units=[...])"
            )
        raise TypeError(f"parameter {self.path!r} is inside a unit that is not open; {remedy}")

    def __repr__(self) -> str:
        return f"<closed parameter {self.path!r} {tuple(self.shape)} {self.dtype}>"


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self._opened(), name)(*args)


for _name in ("neg", "getitem", "add", "sub", "mul", "truediv", "matmul", "pow", "rsub", "rtruediv", "radd", "rmul"):
    setattr(Ref, f"__{_name}__", _operator(f"__{_name}__"))  # python looks for these on the type


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

"""A function of one leaf on those whose path is chosen: what `project` does to parameters and `map_leaves` to
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from funczero.core import tree
from funczero.core.number import flag
from funczero.core.transform import refuse
from funczero.core.types import Grad, State
from funczero.layout.lazy import Lazy


class Chosen(NamedTuple):
    """The leaves, the function, and who applies it."""

    who: str
    what: str  # the leaf of which it is a function, in words
    fn: Callable[[Tensor], Tensor]
    which: str | Callable[[str], bool]
    elementwise: bool | None

    @property
    def name(self) -> str:
        """As it is printed in a chain."""
        named = isinstance(self.which, str)
        return f"{self.who}({repr(self.which) if named else getattr(self.which, '__name__', 'predicate')})"

    def checked(self) -> Chosen:
        """Itself, with a promise that is one.

        Raises:
          TypeError: elementwise is no bool.
        """
        if self.elementwise is not None:
            flag(self.who, "elementwise", self.elementwise)
        return self

    def whole(self, g: Grad) -> None:
        """Refuse leaves that are cut, where nothing is promised: a part's mean or norm is not the leaf's."""
        cut = [a for a in g.layout.sharded if g.env.mesh.axes[a].size > 1]
        if cut and not self.elementwise:
            why = f"nothing says that it works value by value, but the leaves are cut over {cut} here"
            raise refuse(g, self.name, f"{why}; write elementwise=True if it does, or a chain without shard")

    def found(self, params: Lazy) -> State:
        """No state of its own.

        Raises:
          ValueError: the regex is found in no path that learns.
        """
        structure = params.structure
        learning = [leaf.path for i, leaf in enumerate(structure.leaves) if not structure.frozen(i)]
        why = tree.unmatched(self.which, learning) if isinstance(self.which, str) else ""
        if why:
            raise ValueError(f"{self.name}: {why}; correct it, or leave it out")
        return {}

    def takes(self) -> Callable[[str], bool]:
        """Is a leaf at this path one of them?"""
        return tree.matcher(self.which)

    def of(self, path: str, x: Tensor) -> Tensor:
        """What the function makes of a leaf.

        Raises:
          TypeError: it is no tensor like the given one.
        """
        y = self.fn(x)
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            have = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            why = f"of {self.what} {path!r} its function makes {have}"
            raise TypeError(f"{self.who}: {why}; return a tensor like the given one")
        return y

"""Shapes that an optimizer of matrices takes, and which leaves of a tree are matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from funczero.core import tree
from funczero.layout.slots import Slots
from funczero.layout.structure import Leaf
from funczero.transforms.partition import holds


@dataclass(frozen=True)
class Matrices:
    """Which of a partition: leaves of at least `dims` dims whose path does not match."""

    but: str
    dims: int

    def takes(self, leaf: Leaf) -> bool:
        """Is this leaf one of them?"""
        return len(leaf.shape) >= self.dims and not tree.matcher(self.but or None)(leaf.path)

    def __str__(self) -> str:
        return f"matrices(but={self.but!r})" if self.but else "matrices()"


def matrices(but: str = "", dims: int = 2) -> Matrices:
    """The leaves of at least `dims` dims, as which of fz.partition.

    Args:
      but: regex of paths that are left to others, as "embed|head"; a tied leaf is left by any of its paths.

    >>> import funczero as fz
    >>> str(fz.partition([(fz.matrices("embed"), fz.muon(0.02)), ("", fz.adamw(3e-4))]).parts[0])
    "muon(matrices(but='embed'))"
    """
    return Matrices(but, dims)


def refuse_shapes(who: str, params: Any, flatten: int | None = None, most: int = 3) -> None:
    """Refuse leaves that are neither a matrix nor, of `most` dims, a batch of matrices.

    Args:
      flatten: leaves of so many dims are matrices; None: there is no such argument.

    Raises:
      ValueError: by path.
    """
    rest = f"fz.partition([(fz.matrices(but='embed|head'), fz.{who}(lr)), ('', fz.adamw(lr))])"
    for path, shape in _shapes(params):
        if len(shape) < 2:
            raise ValueError(f"{who}: parameter {path!r} of shape {shape} is no matrix; give it to another: {rest}")
        if len(shape) > most and not (flatten and len(shape) >= flatten):
            flat = "" if flatten is None else f"write flatten={most + 1} to take it as [{shape[0]}, rest], or "
            raise ValueError(
                f"{who}: parameter {path!r} of shape {shape} has more than {most} dims; {flat}give it to another:"
                f" {rest}"
            )


def _shapes(params: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Path and shape of every leaf that an optimizer has."""
    if isinstance(params, Slots):
        s = params.where.structure
        return [(x.path, x.shape) for i, x in enumerate(s.leaves) if not s.frozen(i) and holds(s, i)]
    return [(path, tuple(x.shape)) for path, x in tree.paths(params)]

"""A cut: which part of a leaf each rank of a mesh axis holds, and the rules that choose a cut for every leaf.

Rows and Whole are the cuts that exist. Another kind is a frozen dataclass with the same three members. All that is read
of it are the parts that it gives: slots, messages and chunks follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol, runtime_checkable

from funczero.core import tree
from funczero.layout.spec import P


class Extent(NamedTuple):
    """A part of a leaf."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    block: tuple[int, ...]  # shape of a full part, the same on every rank; that of a late rank may be less


@runtime_checkable
class Cut(Protocol):
    """How one mesh axis divides a leaf, or the part of it that outer axes left."""

    @property
    def dim(self) -> int | None:
        """The tensor dim that is divided, for PartitionSpecs; None for no dim."""

    @property
    def replicated(self) -> bool:
        """Do all ranks of the axis hold the same part? Then nothing of it is gathered, and it counts once in a norm."""

    def part(self, of: Extent, size: int, index: int) -> Extent:
        """What rank `index` of `size` holds.

        Law: blocks are equal on all ranks. Parts do not overlap, and together they are `of`; or all ranks have the same
        part, if that is what `replicated` says.
        """


@dataclass(frozen=True)
class Rows:
    """ceil(rows / size) neighbouring rows of a dim; late ranks may hold none.

    >>> [Rows(0).part(Extent((0, 0), (5, 3), (5, 3)), 4, i).shape for i in range(4)]
    [(2, 3), (2, 3), (1, 3), (0, 3)]
    """

    dim: int
    replicated = False

    def part(self, of: Extent, size: int, index: int) -> Extent:
        """The rows of rank `index`."""
        d = self.dim
        rows, stop = -(-of.block[d] // size), of.start[d] + of.shape[d]
        first, last = min(of.start[d] + index * rows, stop), min(of.start[d] + (index + 1) * rows, stop)
        return Extent(_put(of.start, d, first), _put(of.shape, d, last - first), _put(of.block, d, rows))


@dataclass(frozen=True)
class Whole:
    """The same on every rank.

    >>> Whole().part(Extent((0,), (5,), (5,)), 4, 3).shape
    (5,)
    """

    dim = None
    replicated = True

    def part(self, of: Extent, size: int, index: int) -> Extent:
        """All of it."""
        return of


def _put(x: tuple[int, ...], d: int, n: int) -> tuple[int, ...]:
    return (*x[:d], n, *x[d + 1 :])


CutRule = Callable[
    [str, tuple[int, ...]], "P | Cut | None"
]  # (path, global shape) -> a spec, a cut, or None for the default


class Rules(NamedTuple):
    """How one bracket cuts leaves: what its rules say, else dim 0. Leaves under `threshold` elements stay whole.

    `rules` are pairs (regex, P), of which the first that matches the path holds; or a function (path, shape) -> P, cut
    or None.
    """

    rules: tuple[tuple[str, P], ...] | CutRule = ()
    threshold: int = 0

    def find(self, axis: str, path: str, shape: tuple[int, ...]) -> P | Cut | None:
        """What is said of one leaf; None where nothing is.

        Raises:
          TypeError: a function returned something else.
        """
        if not callable(self.rules):
            return tree.rule(self.rules, path, None)
        found = self.rules(path, shape)
        if found is None or isinstance(found, (P, Cut)):
            return found
        write = f"return a P, as P({axis!r}), or None for the default"
        raise TypeError(
            f"shard({axis!r}): rules={_name(self.rules)} gave {found!r} for parameter {path!r} "
            f"of shape {shape}; {write}"
        )


def cuts(path: str, shape: tuple[int, ...], rules: Mapping[str, Rules]) -> tuple[tuple[str, Cut], ...]:
    """The cut of every bracket's axis for one leaf.

    Outer brackets come first. Their rules bind inner axes, and where nothing is said an inner axis follows the outer
    one.

    Args:
      rules: by mesh axis, outermost bracket first.

    Raises:
      ValueError: a rule has more dims than the leaf, or says of an axis what an outer bracket's rule does not.
    """
    out: dict[str, Cut] = {}
    bound: dict[str, int] = {}  # what outer brackets' rules say of inner axes
    default: Cut = unruled(shape)
    for axis, own in rules.items():
        said = own.find(axis, path, shape)
        if isinstance(said, P):
            out[axis] = default = _spec(axis, said, path, shape, out, bound)
        elif said is not None:
            if said.dim is not None and not 0 <= said.dim < len(shape):
                raise ValueError(
                    f"shard({axis!r}): {said!r} cuts dim {said.dim}, but parameter {path!r} has shape {shape}; "
                    "write a dim it has"
                )
            if axis in bound and said.dim != bound[axis]:
                raise ValueError(_contradicts(axis, said, said.dim, path, axis))
            out[axis] = said
            default = said if isinstance(said, (Rows, Whole)) else default
        elif axis in bound:
            out[axis] = default = Rows(bound[axis])
        else:
            out[axis] = Whole() if prod(shape) < own.threshold else default
    return tuple(out.items())


def unruled(shape: tuple[int, ...]) -> Cut:
    """The cut where nothing is said: rows of dim 0, and a leaf without dims stays whole."""
    return Rows(0) if shape else Whole()


def _spec(
    axis: str, spec: P, path: str, shape: tuple[int, ...], out: Mapping[str, Cut], bound: dict[str, int]
) -> Rows | Whole:
    """The cut that a P means for a bracket's axis; what it says of inner axes is bound."""
    if len(spec) > len(shape):
        raise ValueError(
            f"shard({axis!r}): rule {spec} has {len(spec)} dims, but parameter {path!r} has shape {shape}; "
            f"write at most {len(shape)} entries"
        )
    own = dict(spec.axes())
    for name, d in own.items():
        if bound.setdefault(name, d) != d or name in out and out[name].dim != d:
            raise ValueError(_contradicts(axis, spec, d, path, name))
    return Rows(own[axis]) if axis in own else Whole()


def _contradicts(axis: str, rule: P | Cut, d: int | None, path: str, name: str) -> str:
    return (
        f"shard({axis!r}): rule {rule} cuts dim {d} of {path!r} over {name!r}, "
        "but an outer bracket's rule says otherwise; change one of them"
    )


def _name(fn: object) -> str:
    return str(getattr(fn, "__qualname__", type(fn).__qualname__)).rpartition(".")[2]

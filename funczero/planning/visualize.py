"""`visualize`: who holds what, drawn in a terminal or as SVG: a row a leaf, a column a rank."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import product
from math import prod
from typing import Any, NamedTuple

from funczero.core import tree
from funczero.core.number import shown, whole
from funczero.layout.spec import P
from funczero.planning.words import columns

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f")
MOST = 16  # columns


class Drawn(NamedTuple):
    """Who holds what: printed, a table of parts; `svg()`, the same as a picture."""

    mesh: dict[str, int]
    ranks: tuple[str, ...]  # a column each
    leaves: tuple[str, ...]
    parts: tuple[tuple[tuple[int, int], ...], ...]  # by leaf and rank: which part of how many
    left_out: int  # ranks that are not drawn

    def __str__(self) -> str:
        head = ("", *self.ranks)
        rows = [(name, *(_cell(i, n) for i, n in row)) for name, row in zip(self.leaves, self.parts, strict=True)]
        more = [f"and {self.left_out} ranks more, alike"] * bool(self.left_out)
        return "\n".join([*columns([head, *rows], left=len(head)), *more])

    def svg(self, width: int = 12, height: int = 18) -> str:
        """The same as an SVG: a bar is a leaf, and its dark stretch what the rank holds."""
        label, bar = 8 * max(map(len, self.leaves), default=0) + 16, 5 * width
        out, total = [], label + len(self.ranks) * (bar + 8)
        for c, rank in enumerate(self.ranks):
            out.append(f'<text x="{label + c * (bar + 8)}" y="{height - 5}">{escape(rank)}</text>')
        for r, (name, row) in enumerate(zip(self.leaves, self.parts, strict=True), 1):
            y = r * height
            out.append(f'<text x="4" y="{y + height - 5}">{escape(name)}</text>')
            for c, (i, n) in enumerate(row):
                x, colour = label + c * (bar + 8), COLOURS[i % len(COLOURS)]
                out.append(f'<rect x="{x}" y="{y + 2}" width="{bar}" height="{height - 4}" fill="#e8e8e8"/>')
                at, wide = x + bar * i / n, max(bar / n, 1)
                out.append(f'<rect x="{at:g}" y="{y + 2}" width="{wide:g}" height="{height - 4}" fill="{colour}"/>')
        tall = (len(self.leaves) + 1) * height + 6
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{tall}" font-family="monospace"'
        return "\n".join([f'{head} font-size="12">', *out, "</svg>"])


def visualize(specs: Any, mesh: Mapping[str, int]) -> Drawn:
    """Who holds what of a tree of PartitionSpecs: a row a leaf, a column a rank.

    A spec has no shape, so all parts are drawn alike. A rank holds ceil(rows / ranks) rows or fewer: where rows do not
    divide by ranks the last part is smaller, and of a leaf with fewer rows than ranks the last ranks hold nothing.

    Args:
      specs: a tree of P, as step.specs(params)["params"] or all of step.specs(params).
      mesh: sizes of the mesh's axes, outermost first.

    Raises:
      ValueError: a spec names an axis that the mesh has not; a size is none.
      TypeError: a leaf is no P, or the mesh no dict.

    >>> from funczero import P
    >>> print(visualize({"w": P("data"), "b": P(), "v": P(None, ("data", "local"))}, {"data": 2, "local": 2}))
                                  data0,local0  data0,local1  data1,local0  data1,local1
    w P('data')                   █·            █·            ·█            ·█
    b P()                         ████          ████          ████          ████
    v P(None, ('data', 'local'))  █···          ·█··          ··█·          ···█
    """
    named = tree.paths(specs)
    if not isinstance(mesh, Mapping):
        what = f"visualize: mesh={shown(mesh)} is no dict of sizes"
        raise TypeError(f"{what}; write step.mesh.sizes(), or {{'data': 4}}")
    sizes = {axis: whole("visualize", f"mesh axis {axis!r}", n, low=1) for axis, n in mesh.items()}
    places = [dict(zip(sizes, place, strict=True)) for place in product(*map(range, sizes.values()))]
    columned = places[:MOST]
    parts = tuple(tuple(_part(path, spec, sizes, place) for place in columned) for path, spec in named)
    ranks = tuple(",".join(f"{axis}{i}" for axis, i in place.items()) or "0" for place in columned)
    return Drawn(sizes, ranks, tuple(f"{path} {spec}" for path, spec in named), parts, len(places) - len(columned))


def _part(path: str, spec: Any, sizes: Mapping[str, int], place: Mapping[str, int]) -> tuple[int, int]:
    if not isinstance(spec, P):
        raise TypeError(f"visualize: {path!r} is a {type(spec).__name__}, not a P; write step.specs(params)['params']")
    axes = [axis for axis, _ in spec.axes()]
    odd = next((axis for axis in axes if axis not in sizes), None)
    if odd is not None:
        raise ValueError(
            f"visualize: {path!r} is split over {odd!r}, which the mesh {dict(sizes)} has not; write its size"
        )
    index = 0
    for axis in axes:
        index = index * sizes[axis] + place[axis]
    return index, prod(sizes[axis] for axis in axes)


def _cell(i: int, n: int) -> str:
    """A leaf as a bar of its parts, this rank's filled; of many parts its number."""
    if n == 1:
        return "████"
    return "".join("█" if j == i else "·" for j in range(n)) if n <= 8 else f"{i}/{n}"

"""Pairs that somebody wrote, where leaves are cut: a leaf at a time on the rank that owns it, or all leaves on every
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.comm.collectives import all_gather, cut
from funczero.core import tree
from funczero.core.optimizer import Across, Asked, GradientTransformation
from funczero.core.types import Tree
from funczero.layout.lazy import Lazy
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.transforms.deal import Shape, dealt, extents, owned, states_of
from funczero.transforms.leafwise import Exchange, padded

ALONE = "state"  # the name of a state that is like the parameters itself


class Form(NamedTuple):
    """What a pair keeps of a leaf of some shape: the tree, and by leaf of it (name, shape, dtype)."""

    treedef: Any
    leaves: tuple[tuple[str, Shape, torch.dtype], ...]


class ByLeaf:
    """A pair that computes every leaf by itself; it is handed trees of one leaf, by its path.

    Law: at every stage and world the values that `pair.update({path: g}, state, {path: p})` gives on whole leaves, each
    with a state of its own.
    """

    def __init__(self, tx: GradientTransformation) -> None:
        self.tx = tx
        self.across = Across(lambda *piece: Asked(), cost=prod)
        self.forms: dict[tuple[str, Shape, torch.dtype], Form] = {}
        self.kinds: dict[tuple[Shape, torch.dtype], Form] = {}
        self.shapes: dict[tuple[str, torch.dtype], Callable[[Shape], Shape | None]] = {}

    def init(self, params: Slots, lazy: Lazy) -> dict[str, Slots]:
        """By name of what it keeps: that of all leaves, each whole with its owner, from the owner's whole parameter."""
        where, born = params.where, params.buffers[0].dtype
        seats = dealt(where, None, self.across).seats
        forms = {i: self._form(where, i, born) for i in seats}
        kinds = dict((name, dtype) for form in forms.values() for name, _, dtype in form.leaves)
        out = {name: owned(name, params, self.across, self._shape(name, born), dtype) for name, dtype in kinds.items()}
        if params.buffers[0].is_meta:
            return out
        for i, form in forms.items():
            place = _place(where, seats[i].axes)
            if seats[i].owner in (place, None):
                base, _ = extents(where, i, seats[i].axes)
                at = tuple(slice(a, a + n) for a, n in zip(base.start, base.shape, strict=True))
                p = lazy.read(i, at).to(born).to(lazy.device, copy=True)
                self._write(form, self._states(out, form, i), self.tx.init({where.structure.leaves[i].path: p}), None)
        return out

    def update(
        self, grads: Slots, mine: Slots, ok: Tensor, own: dict[str, Slots], mesh: Mesh
    ) -> tuple[Slots, dict[str, Slots]]:
        """As plainly."""
        where, own, born = mine.where, tree.clone(own), mine.buffers[0].dtype
        deal = dealt(where, None, self.across)

        def compute(i: int, values: list[Tensor]) -> Tensor:
            path, form = where.structure.leaves[i].path, self._form(where, i, born)
            views = self._states(own, form, i)
            state = tree.unflatten([v.clone().view(s) for v, (_, s, _) in zip(views, form.leaves)], form.treedef)
            updates, new = self.tx.update({path: values[0]}, state, {path: values[1]})
            self._write(form, views, new, ok)
            out: Tensor = updates[path].to(born)
            return out

        rows = {i: [torch.where(ok, padded(grads, i), 0.0), padded(mine, i)] for i in deal.seats}
        found = Exchange(where, deal, rows, compute, mesh).run()
        out = mine.map(torch.zeros_like)
        for i, x in found.items():
            padded(out, i).copy_(x)
        return out, own

    def _form(self, where: Where, leaf: int, dtype: torch.dtype) -> Form:
        """What it keeps of a leaf, known from zeros of its shape."""
        info = where.structure.leaves[leaf]
        key = (str(info.path), info.shape, dtype)
        if key not in self.forms:
            form = self._formed(self.tx.init({info.path: torch.zeros(info.shape, dtype=dtype)}), info.path)
            if self.kinds.setdefault((info.shape, dtype), form).leaves != form.leaves:
                raise TypeError(
                    f"{self.tx.name}: it keeps another state of parameter {info.path!r} than of others of its shape"
                    f" {info.shape}; write a part of fz.partition for each"
                )
            self.forms[key] = form
        return self.forms[key]

    def _formed(self, state: Tree, path: str) -> Form:
        leaves = []
        for name, x in tree.paths(state):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{self.tx.name}: its state holds a {type(x).__name__} at {name!r}, which could not be kept with"
                    " the owner of a leaf; keep tensors alone, as torch.zeros(()) for a count"
                )
            leaves.append((name.removesuffix(path).strip("/") or ALONE, tuple(x.shape), x.dtype))
        return Form(tree.flatten(state)[1], tuple(leaves))

    def _shape(self, name: str, born: torch.dtype) -> Callable[[Shape], Shape | None]:
        """Shape of a leaf -> that of what is kept of it by this name; a number is one value."""

        def shape(leaf: Shape) -> Shape | None:
            form = self.kinds.get((leaf, born))
            found = None if form is None else next((s for n, s, _ in form.leaves if n == name), None)
            return (1,) if found == () and leaf else found

        return self.shapes.setdefault((name, born), shape)

    def _states(self, own: dict[str, Slots], form: Form, leaf: int) -> list[Tensor]:
        return [states_of([own[name]], leaf)[0] for name, _, _ in form.leaves]

    def _write(self, form: Form, views: list[Tensor], new: Tree, ok: Tensor | None) -> None:
        """A leaf's new state into its place, where the update is applied.

        Raises:
          TypeError: it has another form than the state that it began with.
        """
        flat, treedef = tree.flatten(new)
        alike = [
            isinstance(x, Tensor) and tuple(x.shape) == s and x.dtype == t for x, (_, s, t) in zip(flat, form.leaves)
        ]
        if treedef != form.treedef or not all(alike):
            odd = next((n for (n, _, _), same in zip(form.leaves, alike) if not same), "its tree")
            raise TypeError(
                f"{self.tx.name}: its state changes its form at {odd!r}; return tensors of the shapes and dtypes that"
                " init gives for zeros"
            )
        for view, x in zip(views, flat, strict=True):
            x = x.reshape(view.shape)
            view.copy_(x if ok is None else torch.where(ok, x, view))


def _place(where: Where, axes: tuple[str, ...]) -> int:
    """This rank among those along some axes, outermost first."""
    place = 0
    for a, n, index in where.coords:
        place = place * n + index if a in axes else place
    return place


# --- a pair on all leaves that it is given ----------------------------------------------------------------------------
def plainly(tx: GradientTransformation, grads: Slots, mine: Slots, ok: Tensor, own: Tree) -> tuple[Slots, Tree]:
    """The updates of a pair on these leaves, and its new state: the old one, numbers included, where the update is
    skipped.

    Args:
      grads: with their factor.
      mine: the parameters.

    Raises:
      RuntimeError: `update` wrote into what it was given, so that a state would change which somebody still holds.
    """
    held = {"the parameters": [*mine.buffers], "its state": tree.tensors(own)}
    versions = {what: [x._version for x in xs] for what, xs in held.items()}
    updates, new = tx.update(grads.tree(), own, mine.tree())
    for what, xs in held.items():
        if versions[what] != [x._version for x in xs]:
            raise RuntimeError(
                f"{tx.name}: its update writes into {what}, which stay as they were given; return new tensors, as m = b"
                " * m + g for m.mul_(b).add_(g)"
            )
    state = tree.map(
        lambda n, o: torch.where(ok, n, o) if isinstance(n, Tensor) else n if n is o or bool(ok) else o, new, own
    )
    return _packed(tx.name, updates, mine), state


def _packed(name: str, updates: Tree, like: Slots) -> Slots:
    """A tree of this rank's leaves back in buffers.

    Raises:
      TypeError, ValueError: it is no tree of tensors like the parameters, or says two things of a tied one; with the
        leaf's path.
    """
    structure = like.where.structure
    try:
        flat = structure.treedef.flatten_up_to(updates)
    except ValueError as e:
        raise TypeError(
            f"{name}: its updates are no tree like the parameters ({e}); return one update for every leaf"
        ) from None
    by_leaf: list[Tensor | None] = [None] * len(structure.leaves)
    for place, x in zip(structure.places, flat, strict=True):
        if not structure.frozen(place):
            slot, path = like.where.slots[place], structure.leaves[place].path
            if not isinstance(x, Tensor) or x.shape != slot.shape:
                have = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise TypeError(
                    f"{name}: its update of parameter {path!r} is {have}; return a tensor of this part's shape"
                    f" {slot.shape}"
                )
            twin = by_leaf[place]
            if twin is not None and not ((twin == x) | (twin != twin) & (x != x)).all():
                raise ValueError(
                    f"{name}: it gives the tied parameter {path!r} one update at each of its paths, and they differ;"
                    " return the same at all"
                )
            by_leaf[place] = x
    buffer = like.buffers[0]
    return Slots.pack(like.where, by_leaf, buffer.dtype, buffer.device)


def on_all(
    tx: GradientTransformation, grads: Slots, mine: Slots, ok: Tensor, own: Tree, mesh: Mesh
) -> tuple[Slots, Tree]:
    """The same on whole leaves, gathered on every rank, of which this rank's part is returned; its state is whole on
    every rank.
    """
    axes = mine.where.axes
    grads, mine = (reduce(lambda y, a: all_gather(y, a, mesh), reversed(axes), x) for x in (grads, mine))
    updates, own = plainly(tx, grads, mine, ok, own)
    return reduce(lambda y, a: cut(y, a, mesh), axes, updates), own

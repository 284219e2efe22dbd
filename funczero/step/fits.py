"""Which states a step may take: those that it made or that have its form, with views that are those of their masters.

Law: a state that was made for other coordinates, units or transforms is refused before anything is launched, and views
that this step did not make from these very masters are made anew. Identity answers for the states that the step
returned, a comparison by shapes for all others; what decides is which tensors a program handed over, so that ranks that
run the same program decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.comm.collectives import all_gather
from funczero.comm.wire import Key, as_born
from funczero.core import rng, tree
from funczero.core.straight import outside
from funczero.core.types import Grad, TrainState, Tree
from funczero.layout.lazy import Lazy
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure
from funczero.layout.where import Where, apart
from funczero.step.book import Book, buffers_of
from funczero.step.unlike import chains, fit, places, structures
from funczero.transforms.accumulate import Accumulate
from funczero.transforms.partition import subsets

REMEDY = (
    "begin with step.init(other.params(state)), or take the moments along with Checkpointer(...).restore(like=(step,"
    " params))"
)


class Form(NamedTuple):
    """What a step's states look like for one structure of parameters."""

    masters: Where
    views: Where | None  # None where a view is the cast master
    chain: dict[str, Any] | None  # on the meta device; None for an optimizer that looks at values when it starts


def unused(who: str, state: TrainState) -> None:
    """Refuse a state that was donated, as far as its step can be read.

    Raises:
      RuntimeError: its memory is another state's.
    """
    now = rng.known(state.step)
    if now is not None and now < 0:
        raise RuntimeError(
            f"{who}: this state was donated at step {-1 - now} and its memory is in use; go on with the state that"
            " step(...) returned, restore a checkpoint if that call failed, or leave fz.donate out"
        )


@contextmanager
def using_up(state: TrainState) -> Iterator[None]:
    """While a step writes into the memory of the state that it was given. Where it fails after its first write, the
    state is used up as well; before, a caller may try again with it.
    """
    before, now = state.params.versions(), int(state.step)
    try:
        yield
    except BaseException:
        if before is None or state.params.versions() != before:
            mark_used(state, now)
        raise


def mark_used(state: TrainState, now: int) -> None:
    """A state of this step says from now on that it was donated."""
    state.step.fill_(-1 - now)


def taken_back(state: TrainState) -> None:
    """A state that was marked as used up is whole again."""
    state.step.fill_(-1 - int(state.step))


class Fits:
    """Looks at the states that a step is given."""

    def __init__(self, book: Book, running: Callable[[], Grad], lazy: Callable[[Grad, Tree], Lazy]) -> None:
        """lazy: a tree of meta tensors with the units, cuts and ties that the step gives them."""
        self.book, self.running, self.lazy = book, running, lazy
        self.forms: list[tuple[Structure, Form]] = []  # those asked for, the last one first

    def look(self, state: Any) -> bool:
        """Refuse what this step cannot take; are masters and views of this step's making?

        Raises:
          TypeError: it is no TrainState, or its masters are no Slots, but a tree.
          ValueError: the state is of another stage, chain, mesh or policy, or its leaves have other shapes.
          RuntimeError: it was donated, or a leaf requires grad.
        """
        if not isinstance(state, TrainState):
            raise TypeError(
                f"step: its first argument is a TrainState from step.init(params), but this is a {type(state).__name__}"
            )
        if int(state.step) < 0:
            unused("step", state)
        if not isinstance(state.params, Slots):
            what = (
                f"its masters are a {type(state.params).__name__}, but a state holds this rank's parts of them (Slots)"
            )
            raise TypeError(
                f"step: {what}; write step.init(params) for whole parameters, or state.params.map(fn) to change them"
            )
        made, where = self.book.made(state), state.params.where
        known, form = self.forms[0] if self.forms else (None, None)
        same = (
            made
            and form is not None
            and form.chain is not None
            and known is where.structure
            and state.chain.keys() == form.chain.keys()
        )
        learning = any([b.requires_grad for b in buffers_of(state)])
        if learning or not same or _odd(state.chain, where):
            self._differentiable(state)
            self._compare(state)
        return made

    def suits(self, state: Any) -> None:
        """Refuse what a differentiable step cannot take.

        Raises:
          TypeError, ValueError: as `look`.
          RuntimeError: it was donated.
        """
        if not isinstance(state, TrainState) or not isinstance(state.params, Slots):
            raise TypeError(
                "differentiable: its first argument is a TrainState from step.init(params), but this is a"
                f" {type(state).__name__}"
            )
        unused("differentiable", state)
        self._compare(state)

    def _differentiable(self, state: TrainState) -> None:
        for path, x in tree.paths(state):
            if isinstance(x, Tensor) and x.requires_grad:
                what = "what the step returns would carry a wrong derivative"
                remedy = "write fz.differentiable(step) for one, or give it tree_map(torch.detach, state)"
                raise RuntimeError(f"step: {path!r} of its state requires grad, but {what}; {remedy}")

    def views(self, state: TrainState, made: bool | None = None) -> Slots:
        """The parameters at rest as a forward reads them; views that are not these masters' are gathered, one
        collective an axis.

        Args:
          made: what `look` said, where it is known.

        Raises:
          RuntimeError: nobody has looked at the state, and it was donated.
        """
        if made is None:
            unused("step.views", state)
        g = self.running()
        if state.views is None:
            return state.params.to(g.env.policy.compute)
        if self.book.made(state) if made is None else made:
            return state.views
        remembers, where = differs(g), state.views.where
        if remembers and where.memory and not self.book.replaced(state):
            return state.views
        fresh = state.params.to(g.env.policy.compute).placed(state.views.where.place, g.env.mesh.device)
        for axis in reversed(state.params.where.axes[len(state.views.where.axes) :]):
            edge = g.env.edges[axis]
            fresh = all_gather(fresh, axis if edge.gather.difference else edge, g.env.mesh, at(state))
        return Slots(fresh.buffers, where if where.memory == remembers else replace(where, memory=remembers))

    def settled(self, state: TrainState, views: Slots | None = None) -> TrainState:
        """The same state with views of its masters (these, where they are known), remembered as this step's own."""
        if self.book.made(state) and not packed(self.running()):
            return state
        line = self.book.line(state)
        state = state._replace(views=None if state.views is None else views or self.views(state, made=False))
        self.book.add(state, None if line is None else line.skipped)
        return state

    def form(self, structure: Structure) -> Form:
        """What a state over such parameters looks like here."""
        for i, (known, form) in enumerate(self.forms):
            if known is structure:
                self.forms.insert(0, self.forms.pop(i))
                return form
        with outside():  # it is kept
            form = self._formed(structure)
        self.forms = [(structure, form), *self.forms[:7]]
        return form

    def _formed(self, structure: Structure) -> Form:
        g = self.running()
        own = self.lazy(g, structure.unflatten([torch.empty(leaf.shape, device="meta") for leaf in structure.leaves]))
        inner = next(lay for lay in g.arrows if lay.applied)
        if own.structure == structure:
            own = own._replace(structure=structure)
        masters, rest = (Where(own.structure, g.env.mesh.coords(axes)) for axes in (inner.sharded, g.layout.rest))
        chain: dict[str, Any] | None = None
        try:
            made = g.init(own)
            masters, chain = made.pop("params").where, made
        except (NotImplementedError, RuntimeError):
            pass  # an optimizer that looks at values when it starts
        return Form(masters, apart(masters, rest), chain)

    def _compare(self, state: TrainState) -> None:
        form, policy = self.form(state.params.where.structure), self.running().env.policy
        why = places("parameters", state.params.where, form.masters)
        if not why and (state.views is None) != (form.views is None):
            here, there = (
                ("views apart from its masters", "none")
                if state.views is not None
                else ("no views", "them apart from the masters")
            )
            why = f"it has {here}, but this step keeps {there}"
        why = why or structures(state.params.where.structure, form.masters.structure)
        if not why and state.views is not None and form.views is not None:
            why = places("views", state.views.where, form.views) or fit("views", state.views, policy.compute)
        why = why or fit("params", state.params, policy.params) or chains(state.chain, form.chain)
        if why:
            raise ValueError(f"step: this state is not one of this step: {why}; {REMEDY}")


def at(state: TrainState) -> Key:
    """What the wires of a state's views draw from: the same for these values wherever and however often they are
    gathered.
    """
    return int(state.key), int(state.step)


def packed(g: Grad) -> bool:
    """Are views something else than masters that were cast, because of a wire?"""
    views = lambda e: (e.gather, e.views_of(True))
    edges = [e for e in g.env.edges.values() if g.env.mesh.axes[e.axis].size > 1]
    return any(wire is not as_born for e in edges for wire in views(e))


def differs(g: Grad) -> bool:
    """Do views remember what was sent, so that they do not follow from the masters?"""
    return any(e.gather.difference and g.env.mesh.axes[e.axis].size > 1 for e in g.env.edges.values())


def _odd(x: Any, where: Where) -> bool:
    """Does a transform's state hold a leaf that requires grad, or one that lies elsewhere?"""
    if isinstance(x, Tensor):
        return x.requires_grad
    if isinstance(x, Slots):
        return (
            x.where is not where
            and not x.where.terms
            and x.where not in (where, *subsets(where))
            or any([b.requires_grad for b in x.buffers])
        )
    if isinstance(x, (tuple, list, dict)) and not isinstance(x, Accumulate):
        for y in x.values() if isinstance(x, dict) else x:
            if _odd(y, where):
                return True
    return False

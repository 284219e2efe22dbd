"""What every transform is made of: the one place that passes "nothing yet" through, and the way to refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from funczero.core.exhausted import asking
from funczero.core.spans import span
from funczero.core.types import Apply, ChainError, Grad, Layout, Out, Seed, State, Tree

if TYPE_CHECKING:
    from funczero.layout.lazy import Lazy
    from funczero.layout.slots import Slots

In = TypeVar("In", bound=Out)  # what a transform takes of the three
Carried = TypeVar("Carried")


def refuse(g: Grad, name: str, why: str) -> ChainError:
    """The error for a transform that cannot stand right of g."""
    return ChainError(f"{name}: {why}\n  {' | '.join((*g.names, name))}  <- here")


def after(
    g: Grad,
    name: str,
    layout: Layout,
    fn: Callable[[In, State], tuple[Out, State]],
    init: Callable[[Lazy], State] | None = None,
    seed: Callable[[Seed, State], Seed] | None = None,
) -> Grad:
    """g, then fn; here and in `around` "nothing yet" (None) is passed through, and nowhere else.

    Args:
      fn: (out, state) -> (out, state): a Sum, a Value or Updated, by the phase of g.layout and of `layout`;
        state is the flat dict of the whole chain.
      init: lazy parameters -> this transform's own entries of the state.
      seed: (seed, state) -> the seed handed to the left.
    """

    def apply(views: Slots, state: State, batch: Tree, s: Seed) -> tuple[Out | None, State]:
        out: Any  # an `In`, as the phase of g's layout says
        out, state = g.apply(views, state, batch, s if seed is None else seed(s, state))
        return (None, state) if out is None else _named(name, fn, out, state)

    return _right_of(g, name, layout, apply, init)


def around(
    g: Grad,
    name: str,
    layout: Layout,
    before: Callable[[Slots, Seed, State], tuple[Seed, Carried]],
    fn: Callable[[In, State, Carried], tuple[Out, State]],
    init: Callable[[Lazy], State] | None = None,
    called: str = "",
) -> Grad:
    """As `after`, for a transform whose two halves share a value.

    Args:
      before: (views at rest, seed, state) -> (the seed handed to the left, a value that is carried past it).
      fn: (out, state, carried) -> (out, state).
      init: as after's.
      called: in a trace and where it finds no memory, if its name in the chain says too little there.
    """

    def apply(views: Slots, state: State, batch: Tree, s: Seed) -> tuple[Out | None, State]:
        s, carried = before(views, s, state)
        out: Any  # an `In`, as the phase of g's layout says
        out, state = g.apply(views, state, batch, s)
        return (None, state) if out is None else _named(called or name, fn, out, state, carried)

    return _right_of(g, name, layout, apply, init)


def _named(name: str, fn: Callable[..., tuple[Out, State]], *args: Any) -> tuple[Out, State]:
    """fn(*args) under a transform's name, in a trace and where it finds no memory."""
    with span(name), asking(lambda: f"in {name}"):
        return fn(*args)


def _right_of(g: Grad, name: str, layout: Layout, apply: Apply, init: Callable[[Lazy], State] | None) -> Grad:
    both = g.init if init is None else lambda params: {**g.init(params), **init(params)}
    return g._replace(init=both, apply=apply, layout=layout, names=(*g.names, name), arrows=(*g.arrows, layout))


def beside_update(g: Grad, name: str) -> None:
    """Refuse a place for what works on new parameters but right of the last optimizer, inside its bracket."""
    if not g.layout.applied:
        raise refuse(g, name, "there are no new parameters yet; write it right of the last optimizer")
    if g.layout.sharded != next(lay.sharded for lay in g.arrows if lay.applied):
        raise refuse(g, name, "the bracket around the optimizer is closed; write it inside, beside the optimizer")


def slot_name(g: Grad, kind: str) -> str:
    """Where a transform keeps its state: its kind, then kind#2, ...

    Names carry no bracket and no index, so a checkpoint's paths are the same at every stage.
    """
    n = sum(name.split("(")[0] == kind for name in g.names)
    return kind if n == 0 else f"{kind}#{n + 1}"

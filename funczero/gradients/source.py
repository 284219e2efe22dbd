"""What every Source is made of: its layout, a gradient on a tape, and the chain that begins with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch

from funczero.comm.collectives import all_gather
from funczero.comm.wire import Key
from funczero.core import order
from funczero.core.exhausted import asking
from funczero.core.types import Apply, ChainError, Env, Grad, Layout, Seed, Sum
from funczero.gradients.arrivals import Collected
from funczero.gradients.tape import Tape
from funczero.layout.lazy import Lazy
from funczero.layout.slots import Slots
from funczero.layout.spec import P
from funczero.transforms import feedback
from funczero.transforms.chain import Source, opening
from funczero.transforms.exact import noted
from funczero.transforms.feedback import remembers


def layout_of(source: Source, env: Env) -> Layout:
    """Of what a Source returns."""
    axes = (*source.axes, *source.scatter)
    _refuse_axes(source, axes)
    sizes = tuple((a, env.mesh.axes[a].size) for a in axes)
    return Layout(source.batch, frozenset(source.batch) - set(axes), axes, source.axes, sizes, cut=source.cut)


def _refuse_axes(source: Source, axes: tuple[str, ...]) -> None:
    """Every bracket cuts an axis of the batch, once."""
    for a in axes:
        if a not in source.batch:
            raise ChainError(
                f"shard({a!r}): the gradient is not a partial sum over {a!r}, because the batch is not split over it;"
                f" write {source.name}(..., batch=P({a!r}))\n  {''.join(f'{x}[ ' for x in source.axes)}{source.name} "
                " <- here"
            )
    if len(set(axes)) < len(axes):
        raise ChainError(
            f"shard({axes[-1]!r}): {axes[-1]!r} is bracketed twice; a mesh axis is cut once\n "
            f" {''.join(f'{x}[ ' for x in source.axes)}{source.name}  <- here"
        )


def on_tape(source: Source, env: Env, layout: Layout, differentiate: Callable[..., Any], forward: bool = True) -> Apply:
    """A first-order gradient: units are opened and scattered one by one."""
    axes = layout.sharded

    def apply(views: Slots, state: dict[str, Any], batch: Any, seed: Seed) -> tuple[Sum, dict[str, Any]]:
        mine = seed._replace(index=seed.index + order.indices(layout, env.mesh.index)[0])
        held = feedback.of_axes(state, axes, seed)
        key, conditional = (seed.key, seed.index), bool(source.conditional)
        tape = Tape(views, source.scatter, env, seed.look, True, seed.at, key, held, conditional, seed.grid)
        whole = tape.open_rest(forward)
        found, grads = differentiate(whole, batch, mine, state, tape)
        closed = close(tape, grads)
        for a in held:
            state = feedback.renewed(state, env.edges[a], tape.arrivals.memory(a))
        found, used = found.detached(), None
        if env.keeps:
            used = torch.zeros(len(views.where.structure.leaves), dtype=torch.int64, device=env.mesh.device)
            used[sorted(tape.arrivals.used)] = 1
        out = Sum(found.loss[None], found.weight[None], found.aux, closed.grads, closed.bad, found.moved, used)
        out = of_deal(out, seed)
        return out if closed.tally is None else noted(out, closed.tally), state

    return apply


def of_deal(out: Sum, seed: Seed) -> Sum:
    """A sum of a micro-batch that says how many there are, where that is not as many as there are places."""
    return out if seed.micros is None else out._replace(micros=torch.tensor(seed.micros))


def gradient_of(source: Source, env: Env, layout: Layout, apply: Apply) -> Grad:
    """A Source's gradient, with the chain's names and the memories of its wires."""
    axes, mesh = layout.sharded, env.mesh

    def view(views: Slots, at: Key = (0,)) -> Slots:
        return reduce(lambda x, a: all_gather(x, env.edges[a], mesh, at), reversed(source.axes), views)

    def init(params: Lazy) -> dict[str, Any]:
        left = lambda i: [a for a in source.batch if a not in axes[:i]]
        at = [feedback.empty(params, env, a, axes[:i], left(i)) for i, a in enumerate(axes) if remembers(env, a)]
        own = {} if env.model is None else env.model.init(params.device)
        return own | {name: own for state in at for name, own in state.items()}

    said = f"(batch={P(source.batch if len(source.batch) > 1 else source.batch[0])})" if source.batch else ""
    if source.spec is not None:
        said = f"(batch={source.spec})"
    opened = tuple(opening(env.edges[a]) for a in source.axes)
    arrows = (*[Layout()] * len(opened), layout)
    return Grad(init, view, apply, layout, (*opened, source.name + said), env, arrows, fresh=apply)


def close(tape: Tape, grads: list[Any]) -> Collected:
    """Leaf gradients and the tape's units as Slots; what lies outside the units is scattered here, where it must be.

    Args:
      grads: by leaf, given away: each is let go as soon as it is copied.
    """
    with asking(lambda: "for gradients, as they become buffers and travel"), tape.arrivals.or_nothing():
        return _closed(tape, grads)


def _closed(tape: Tape, grads: list[Any]) -> Collected:
    structure, where, device = tape.whole.structure, tape.whole, tape.port.device
    tape.end()
    tape.arrivals.used.update(i for i, g in enumerate(grads) if g is not None)
    if tape.env.early is not None and tape.env.early.used is not None:
        tape.env.early.used.update(tape.arrivals.used)
    if not tape.seam:
        bad = None
        if tape.look:
            zero = torch.zeros((), dtype=torch.int64, device=device)
            bad = torch.stack([zero if g is None else (~g.isfinite()).sum() for g in grads])
        packed = Slots.pack(where, grads, tape.dtype, device, spent=True)
        return Collected(Slots(packed.buffers, tape.arrivals.here), bad)
    loose = [u for u, unit in enumerate(structure.units) if not unit.seam and not unit.frozen and structure.members[u]]
    return tape.arrivals.close({u: [grads[i] for i in structure.members[u]] for u in loose})


def names_of(axes: str | Sequence[str]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def patterns_of(who: str, which: Any) -> tuple[tuple[str, str], ...]:
    return ((who, which),) if isinstance(which, str) else ()

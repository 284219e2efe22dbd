"""One update of a chain on tensors without values, as the step itself makes it."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funczero.core import order, rows, tree
from funczero.core.number import kind, shown
from funczero.core.types import Grad, Seed, State, TrainState, Updated
from funczero.layout.lazy import Fill
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.planning.hollow import emptied, hollow
from funczero.planning.standin import standing_in
from funczero.planning.trace import Trace, on_mesh
from funczero.step.initial import initial, read_lazily
from funczero.step.step import Step
from funczero.transforms.chain import Source
from funczero.transforms.model_state import MODEL

META = torch.device("meta")
MANY = 64  # ranks that are compared


class Ran(NamedTuple):
    """An update that was gone through."""

    grad: Grad  # on the mesh of the plan
    state: TrainState  # before it, on the meta device
    trace: Trace
    views: int  # bytes of the views that an update reads, where they are not the masters themselves


def gone_through(step: Step, params: Any, batch: Any, sizes: dict[str, int], rank: int) -> Ran:
    """One update of a step on a mesh, as one of its ranks makes it once it knows its course: the first one of a run
    gathers small neighbours one by one.

    Args:
      params, batch: as plan's.
      sizes: of the mesh's axes, outermost first.

    Raises:
      ValueError, TypeError: as plan's.
    """
    source, env = step.source, step.grad.env
    # exact sums ask how large values are where they lie, which on a CPU they do
    device = META if batch is None and not env.exact else env.mesh.device
    part = env.mesh.connected and prod(sizes.values()) == prod(env.mesh.sizes().values()) and not env.mesh.world_group

    def seen_by(trace: Trace) -> Grad:
        mesh = on_mesh(sizes, rank, device, env.mesh.device, trace)
        if part:  # of the world, whose sums go axis by axis
            mesh = mesh._replace(world_group="")
        mesh.ledger.replicated = source.replicated
        here = env._replace(mesh=mesh, early=None)
        return step.interpreted(here, standing_in(source)) if batch is None else step.interpreted(here)

    if isinstance(batch, order.Dealt):
        raise TypeError("plan: its batch is one rank's rows, as local_rows gave them; give the global batch")
    g = seen_by(Trace())
    state = _begun(g, step, params)
    if _groups(state, g):
        _made(g, Trace(), state, batch, device, source)
    trace = Trace()
    g = seen_by(trace)
    return Ran(g, state, trace, _made(g, trace, state, batch, device, source))


def _groups(state: TrainState, g: Grad) -> bool:
    """Are there units that may share a message?"""
    where = Where.whole(state.params.where.structure)
    wide = sorted(n * g.env.policy.compute.itemsize for n in where.lengths if n)
    return bool(g.layout.rest) and sum(wide[:2]) <= g.env.link.together


def _made(g: Grad, trace: Trace, state: TrainState, batch: Any, device: torch.device, source: Source) -> int:
    """An update by g, which the trace sees; bytes of the views that it reads, where they are not the masters."""
    whole = torch.empty(g.layout.stride, device=META) if batch is None else shapes_of(batch, "leaf of the batch")
    mine = order.deal(whole, g.layout, g.env.mesh.index)
    with hollow(trace.saw, device, g.env.mesh):
        held = _closed(emptied(state, device), g)
        for name, part in parts_of(held).items():
            trace.live.hold(part, name)
        leaves, build = rows.opened(mine, g.layout.cut)
        here = build([emptied(x.value, device) for x in leaves])
        trace.live.hold(rows.tensors(here), "batch")
        views = held.views if held.views is not None else held.params.to(g.env.policy.compute)
        pairs = zip(views.buffers, held.params.buffers, strict=True)
        apart = [a for a, b in pairs if a is not b]
        trace.live.hold(apart, "views")
        trace.live.hold(held.params, "masters")  # which views may be
        out = _applied(g, views, {**held.chain, "params": held.params}, here, source.name == "pullback")
        if held.views is not None:  # new views in their dtype, as the step keeps them
            out.params.to(views.buffers[0].dtype)
        trace.ended()
    return sum(x.nbytes for x in apart)


def known(step: Step, params: Any, who: str = "plan") -> Any:
    """The parameters that were given, or the shapes of those that the step was given last.

    Raises:
      ValueError: neither is there.
    """
    if params is not None:
        return params
    masters = step.fits.book.masters
    if masters is None:
        raise ValueError(
            f"{who}: the step has no state yet, so its parameters are not known; write {who}(step, params)"
        )
    return masters.structure.unflatten([torch.empty(leaf.shape, device=META) for leaf in masters.structure.leaves])


def heaviest(step: Step, params: Any, sizes: dict[str, int]) -> tuple[int, int]:
    """The rank that holds most at rest, and how many bytes; in the time that the state's form takes.

    Where optimizers have whole leaves, ranks hold different ones: the first MANY are looked at. Else all hold as much.
    """
    env = step.grad.env

    def of(rank: int) -> tuple[int, Grad]:
        mesh = on_mesh(sizes, rank, META, env.mesh.device, Trace())
        g = step.interpreted(env._replace(mesh=mesh, early=None))
        return sum(bytes_of(_begun(g, step, params)).values()), g

    first, g = of(0)
    others = range(1, min(prod(sizes.values()), MANY) if g.notes(None) else 1)
    return max([(0, first), *((rank, of(rank)[0]) for rank in others)], key=lambda found: (found[1], -found[0]))


def _begun(g: Grad, step: Step, params: Any) -> TrainState:
    """The first state, as shapes.

    Raises:
      ValueError: an optimizer looks at values when it starts.
    """
    own = read_lazily(step.source, g, shapes_of(known(step, params), "parameter"), META)
    try:
        return initial(g, own, 0)
    except NotImplementedError as error:
        why = f"an optimizer looks at values when it starts, and a plan has none ({str(error).splitlines()[0]})"
        raise ValueError(f"plan: {why}; plan the chain with fz.adamw in its place") from error


def _closed(state: TrainState, g: Grad) -> TrainState:
    """A state as updates leave it: views that came over axes of one rank alone, in the masters' dtype, are these,
    but for frozen leaves."""
    masters, views = state.params, state.views
    if views is None or views.where.memory or views.buffers[0].dtype != masters.buffers[0].dtype:
        return state
    crossed = masters.where.axes[len(views.where.axes) :]
    if any(g.env.mesh.axes[axis].size > 1 for axis in crossed):
        return state
    return state._replace(views=Slots(masters.buffers, views.where).with_frozen(views))


def parts_of(state: TrainState) -> dict[str, Any]:
    """The tensors of a state by what they are for."""
    wires = {k: x for k, x in state.chain.items() if k.startswith("feedback@")}
    moments = {k: x for k, x in state.chain.items() if k not in wires and k != MODEL}
    return {
        "masters": state.params,
        "views": state.views,
        "moments": moments,
        "wires": wires,
        "model state": state.chain.get(MODEL),
        "counters": (state.step, state.updates, state.key),
    }


def bytes_of(state: TrainState) -> dict[str, int]:
    """Bytes of a state by what they are for; of any state, planned or real.

    Law: they add up to the bytes of all its tensors, of which each counts once.
    """
    return {name: sum(x.nbytes for x in tree.tensors(part)) for name, part in parts_of(state).items()}


def _applied(g: Grad, views: Slots, state: State, batch: Any, elsewhere: bool) -> Updated:
    """The chain's own update; a streamed window is full."""
    seed = Seed(torch.ones(()), 0, 0, False, (0, 0))
    k = next((n for name, n in reversed(g.layout.order) if name == "accumulate"), 1) if g.streams else 1
    for micro in rows.split(batch, k, "plan", g.layout.cut):
        given = (_pulled(views, g), torch.zeros(()), torch.ones(())) if elsewhere else micro
        out, state = g.apply(views, state, given, seed)
    if g.streams:
        out, state = g.apply(views, state, None, seed)
    assert isinstance(out, Updated)
    return out


def _pulled(views: Slots, g: Grad) -> Any:
    """A forward elsewhere, whose gradients come as they were born."""
    structure, dtype = views.where.structure, views.buffers[0].dtype

    def pull(cotangent: Tensor) -> Any:
        return structure.unflatten([torch.empty(leaf.shape, dtype=dtype) for leaf in structure.leaves])

    return pull


def shapes_of(values: Any, what: str) -> Any:
    """A tree with a meta tensor for everything that has a shape and a dtype; tied leaves stay one.

    Raises:
      TypeError: a shape without a dtype of torch.

    >>> shapes_of({"w": torch.ones(2, 3), "n": 4}, "parameter")
    {'w': tensor(..., device='meta', size=(2, 3)), 'n': 4}
    """
    if isinstance(values, nn.Module):
        values = dict(values.named_parameters(remove_duplicate=False))
    known: dict[int, Any] = {}

    def shape(x: Any) -> Any:
        if not isinstance(x, (Tensor, Fill)) and not (hasattr(x, "shape") and hasattr(x, "dtype")):
            return x
        if id(x) not in known:
            known[id(x)] = x, torch.empty(tuple(x.shape), dtype=_dtype(x, what), device=META)
        return known[id(x)][1]

    leaves, build = rows.opened(values)
    return build([shape(leaf.value) for leaf in leaves])


def _dtype(x: Any, what: str) -> torch.dtype:
    if isinstance(x.dtype, torch.dtype):
        return x.dtype
    name = str(getattr(x.dtype, "name", x.dtype)).removeprefix("torch.")
    found = getattr(torch, name, None)
    if isinstance(found, torch.dtype):
        return found
    raise TypeError(
        f"plan: a {what} is {kind(x)} of dtype {shown(x.dtype)}; give meta tensors, or shapes with a dtype of torch"
    )

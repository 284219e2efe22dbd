"""Composition: parts become a gradient, and whatever cannot mean what it says is refused here, in any process.

Left of the mean are sums (linear, in any order); right of it are values. `mean` is inserted by the first nonlinear transform.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero import order, tree
from funczero.collectives import sum_integers
from funczero.norm import BINS, CHUNK, folds, norm_of, square_bins
from funczero.spec import Rules, Slots
from funczero.types import ChainError, Env, Grad, GradientTransformation, Layout, Out, Seed, Transform


class Source(NamedTuple):
    """A gradient not yet built: brackets that open left of it still add their axis, and what follows is inside them."""

    name: str
    make: Callable[[Source, Env], Grad]
    batch: tuple[str, ...]
    units: tuple[str, ...] = ()
    frozen: Callable[[str], bool] = lambda path: False
    axes: tuple[str, ...] = ()  # brackets open left of it, outermost first: what parameters at rest are split over
    scatter: tuple[str, ...] = ()  # brackets that open directly right of it: the seam scatters for them
    rules: tuple[tuple[str, Rules], ...] = ()
    transforms: tuple[Any, ...] = ()


class Bracket(NamedTuple):
    """`shard(axis, *parts)` right of a Source."""

    axis: str
    parts: tuple[Any, ...]
    rules: Rules
    edges: Callable[[Grad, Bracket], Grad]
    opened: bool = False  # the Source already scatters over it, at the seam


class Configure(NamedTuple):
    """A part that changes the Source, wherever it stands."""

    name: str
    source: Callable[[Source], Source]


class Lift(NamedTuple):
    """An optimizer in its place; the last one of a chain applies the update."""

    tx: GradientTransformation
    applies: bool


def refuse(g: Grad, name: str, why: str) -> ChainError:
    """The error for a transform that cannot stand right of g."""
    return ChainError(f"{name}: {why}\n  {' | '.join((*g.names, name))}  <- here")


def after(
    g: Grad,
    name: str,
    layout: Layout,
    fn: Callable[[Out, dict[str, Any]], tuple[Out, dict[str, Any]]],
    init: Callable[[Any], dict[str, Any]] | None = None,
    seed: Callable[[Seed, dict[str, Any]], Seed] | None = None,
) -> Grad:
    """g, then fn; the one place that passes "nothing yet" (None) through.

    Args:
      fn: (out, state) -> (out, state); state is the flat dict of the whole chain.
      init: lazy parameters -> this transform's own entries of the state.
      seed: (seed, state) -> the seed handed to the left.
    """

    def apply(views: Any, state: dict[str, Any], batch: Any, s: Seed) -> tuple[Out | None, dict[str, Any]]:
        out, state = g.apply(views, state, batch, s if seed is None else seed(s, state))
        return (None, state) if out is None else fn(out, state)

    both = g.init if init is None else lambda params: {**g.init(params), **init(params)}
    return g._replace(init=both, apply=apply, layout=layout, names=(*g.names, name), arrows=(*g.arrows, layout))


def slot_name(g: Grad, kind: str) -> str:
    """Where a transform keeps its state: its kind, then kind#2, ...

    Names carry no bracket and no index, so a checkpoint's paths are the same at every stage.
    """
    n = sum(name.split("(")[0] == kind for name in g.names)
    return kind if n == 0 else f"{kind}#{n + 1}"


# --- building ---------------------------------------------------------------------------------------------------------
def build(parts: Sequence[Any], env: Env) -> Grad:
    """A gradient from a Source and the parts to its right."""
    if not parts or not isinstance(parts[0], Source):
        first = _name(parts[0]) if parts else "nothing"
        raise ChainError(f"chain: it begins with {first}, but a chain begins with a gradient; write value_and_grad(loss_fn, batch=...) or pullback() first")
    source, *rest = parts
    if source.axes and rest:
        inside = " | ".join((source.name, *(_name(p) for p in source.transforms)))
        raise ChainError(
            f"{_name(rest[0])}: it stands after the bracket that holds the parameters at rest, which has no closing edge; move it inside: "
            f"shard({source.axes[-1]!r}, {inside.replace(' | ', ', ')}, {', '.join(map(_name, rest))})\n"
            f"  {''.join(f'{a}[ ' for a in source.axes)}{inside}{' ]' * len(source.axes)} | {_name(rest[0])}  <- here"
        )
    source, marked = configured(parts), _mark(_flatten((*source.transforms, *rest)))
    rules = dict(source.rules) | _rules(marked)
    for axis in (*rules, *source.axes, *source.batch):
        if axis not in env.mesh.axes:
            raise ChainError(f"{source.name}: {axis!r} is not an axis of the mesh ({env.mesh}); write one of {list(env.mesh.axes)}")
    if source.units:
        source, marked = _open_at_seam(source, marked)
    g = source.make(source, env._replace(rules=rules))
    return fold(g, marked)


def fold(g: Grad, parts: Sequence[Any]) -> Grad:
    """g, then every part in order."""
    for part in parts:
        if isinstance(part, Bracket):
            g = part.edges(g, part)
        elif isinstance(part, Lift):
            g = _apply_update(g, part.tx) if part.applies else _rewrite(g, part.tx)
        elif isinstance(part, Source):
            raise refuse(g, part.name, "a chain has one gradient, at its left end; write a second chain for a second loss")
        elif callable(part):
            g = part(g)
        else:
            raise refuse(g, _name(part), "this is neither a transform nor an optimizer; write a function Grad -> Grad or an (init, update) pair")
    return g


def chain(*transforms: Any) -> tuple[Any, ...]:
    """Parts as one part: what stands between two transforms may stand in a name."""
    return _flatten(transforms)


def _name(part: Any) -> str:
    if isinstance(part, Bracket):
        return f"shard({part.axis!r}, {', '.join(map(_name, part.parts))})"
    if isinstance(part, Lift):
        return part.tx.name
    return str(getattr(part, "name", None) or getattr(part, "__name__", type(part).__name__))


def _flatten(parts: Sequence[Any]) -> tuple[Any, ...]:
    plain: list[Any] = []
    for p in parts:
        plain += _flatten(p) if type(p) in (tuple, list) else [p]
    return tuple(plain)


def configured(parts: Sequence[Any]) -> Source:
    """The Source as the parts that change it (freeze) leave it."""
    source, *rest = parts
    for configure in _configures(_flatten((*source.transforms, *rest))):
        source = configure.source(source)
    return source


def _configures(parts: Sequence[Any]) -> list[Configure]:
    return [c for p in parts for c in ([p] if isinstance(p, Configure) else _configures(p.parts) if isinstance(p, Bracket) else [])]


def _is_optimizer(part: Any) -> bool:
    own = isinstance(part, (Source, Bracket, Configure, Lift))
    return not own and callable(getattr(part, "init", None)) and callable(getattr(part, "update", None))


def _mark(parts: Sequence[Any]) -> tuple[Any, ...]:
    """Optimizers as Lifts; the last one applies. One in a bracket that closes before the last is refused."""
    found: list[tuple[tuple[int, ...], Any]] = []

    def walk(parts: Sequence[Any], path: tuple[int, ...]) -> None:
        for i, p in enumerate(parts):
            if isinstance(p, Bracket):
                walk(p.parts, (*path, i))
            elif _is_optimizer(p):
                found.append(((*path, i), p))

    walk(parts, ())
    last = found[-1][0] if found else ()
    for path, p in found[:-1]:
        if path[:-1] != last[:-1]:
            raise ChainError(
                f"{_name(found[-1][1])}: it stands in another bracket than {_name(p)} before it, but an update is applied once, with the last optimizer; "
                f"put both inside the same bracket\n  {' | '.join(_name(p) for p in parts)}"
            )

    def replaced(parts: Sequence[Any], path: tuple[int, ...]) -> tuple[Any, ...]:
        out: list[Any] = []
        for i, p in enumerate(parts):
            if isinstance(p, Bracket):
                out.append(p._replace(parts=replaced(p.parts, (*path, i))))
            elif _is_optimizer(p):
                tx = p if isinstance(p, GradientTransformation) else GradientTransformation(p.init, p.update, name=type(p).__name__)
                out.append(Lift(tx, (*path, i) == last))
            elif not isinstance(p, Configure):
                out.append(p)
        return tuple(out)

    return replaced(parts, ())


def _rules(parts: Sequence[Any]) -> dict[str, Rules]:
    out: dict[str, Rules] = {}
    for p in parts:
        if isinstance(p, Bracket):
            out |= {p.axis: p.rules} | _rules(p.parts)
    return out


def _open_at_seam(source: Source, parts: tuple[Any, ...]) -> tuple[Source, tuple[Any, ...]]:
    """Brackets that open directly right of a Source with units scatter each unit's gradient as soon as it exists."""
    first = parts[0] if parts else None
    if not isinstance(first, Bracket) or first.axis not in source.batch or first.axis in (*source.axes, *source.scatter):
        return source, parts
    source, inner = _open_at_seam(source._replace(scatter=(*source.scatter, first.axis)), first.parts)
    return source, (first._replace(parts=inner, opened=True), *parts[1:])


# --- the mean, and what is right of it ----------------------------------------------------------------------------------
def mean(g: Grad) -> Grad:
    """The sum becomes a value: divided by the weight, through `factor` alone, with one packed integer collective an update.

    Every loss and weight travels as its float64 bits at its global micro-batch index (zero elsewhere), with the norm's integer
    bins: integer sums have no order. Left of it are sums, right of it values. A weight of zero leaves ok false.
    """
    lay, env = g.layout, g.env
    if lay.mean:
        raise refuse(g, "mean", "the mean is already taken, here or by a nonlinear transform left of it; leave this one out")
    if lay.unreduced:
        raise refuse(g, "mean", _partial(lay))

    places = torch.tensor(order.indices(lay, env.mesh.index), device=env.mesh.device)

    def fn(out: Out, state: dict[str, Any]) -> tuple[Out, dict[str, Any]]:
        columns = [out.loss[:, None].double(), out.weight[:, None].double()] + ([] if out.aux is None else [out.aux[0]])
        rows = torch.cat(columns, 1)
        bits = torch.zeros(lay.stride, rows.shape[1], dtype=torch.int64, device=rows.device)
        bits.index_copy_(0, places[: len(rows)], rows.view(torch.int64))
        parts = [bits.view(-1), _norm_bins(out.grads, lay, env)]
        if out.bad is not None:
            parts.append(_place_of(out.bad, lay, env))
        packed = sum_integers(torch.cat(parts), lay.batch, env.mesh)
        total = order.tree_sum(packed[: bits.numel()].view(torch.float64).view(lay.stride, -1))
        bins = packed[bits.numel() : bits.numel() + 1 + BINS]
        bad = None if out.bad is None else _first_bad(packed[bits.numel() + 1 + BINS :], len(out.bad))
        loss, weight = total[0], total[1]
        finite, factor = bins[0] == 0, 1 / weight.clamp(min=torch.finfo(torch.float64).tiny)
        norm = torch.where(finite, norm_of(bins, folds(out.grads.buffers[0].dtype)) * factor, torch.inf)
        aux = None if out.aux is None else tree.unflatten(list(total[2:]), out.aux[1])
        return Out(loss * factor, weight, aux, out.grads, factor, norm, finite & (weight > 0), bad, out.logs), state

    return after(g, "mean", replace(lay, mean=True), fn)


def _norm_bins(grads: Slots, lay: Layout, env: Env) -> Tensor:
    """This rank's share of the norm: every value counted on one rank only."""
    first = all(env.mesh.index(a) == 0 for a in lay.batch if a not in lay.sharded)
    mine = []
    for u, buffer in enumerate(grads.buffers):
        for axes, start, stop in grads.where.sections[u] if buffer.numel() and first else ():
            if all(env.mesh.index(a) == 0 for a in axes):
                mine.append(buffer[start:stop])
    if sum(x.numel() for x in mine) <= CHUNK:
        mine = [torch.cat(mine)] if mine else []
    total = torch.zeros(1 + BINS, dtype=torch.int64, device=grads.buffers[0].device)
    for x in mine:
        total += square_bins(x)
    return total


def global_norm(grads: Slots, factor: Tensor, lay: Layout, env: Env) -> Tensor:
    """The norm of factor * grads over the whole tree, for a gradient that was rewritten since the mean; one collective."""
    bins = sum_integers(_norm_bins(grads, lay, env), lay.batch, env.mesh)
    return torch.where(bins[0] == 0, norm_of(bins, folds(grads.buffers[0].dtype)) * factor, torch.inf)


def rank_of(lay: Layout, env: Env) -> tuple[int, int]:
    """This rank among those that share the batch, and their number."""
    index, size = 0, 1
    for a in lay.batch:
        index, size = index * env.mesh.axes[a].size + env.mesh.index(a), size * env.mesh.axes[a].size
    return index, size


def _place_of(bad: Tensor, lay: Layout, env: Env) -> Tensor:
    index, size = rank_of(lay, env)
    table = torch.zeros(size, len(bad), dtype=torch.int64, device=bad.device)
    table[index] = bad
    return table.view(-1)


def _first_bad(flat: Tensor, leaves: int) -> Tensor:
    """[leaf, rank] of the first non-finite leaf, [-1, -1] where there is none."""
    table = flat.view(-1, leaves) > 0
    leaf = table.any(0).byte().argmax()
    rank = table[:, leaf].byte().argmax()
    return torch.where(table.any(), torch.stack([leaf, rank]), -1)


def _partial(lay: Layout) -> str:
    axes = [a for a in lay.batch if a in lay.unreduced]
    return f"the gradient is still a partial sum over mesh axes {axes}; put all_reduce({axes[0]!r}) or shard({axes[0]!r}, ...) before it"


def value(g: Grad, name: str) -> Grad:
    """g as a value that a nonlinear transform may read: the mean is inserted here, once."""
    if g.layout.applied:
        raise refuse(g, name, "the update is already applied; put it further left, inside the bracket and before the last optimizer")
    if g.layout.unreduced:
        raise refuse(g, name, _partial(g.layout))
    return g if g.layout.mean else mean(g)


def pointwise(name: str, fn: Callable[[Tensor, Tensor], Tensor]) -> Transform:
    """A nonlinear transform that rewrites gradients value by value: fn(grads, factor) -> grads; zero must stay zero."""

    def transform(g: Grad) -> Grad:
        g = value(g, name)
        return after(g, name, g.layout, lambda out, state: (rewritten(out, out.grads.map(lambda b: fn(b, out.factor.to(b.dtype)))), state))

    transform.__name__ = name
    return transform


def rewritten(out: Out, grads: Slots) -> Out:
    """Out with other gradients: their factor is one and their norm unknown."""
    logs = out.logs if out.norm is None else {"grad_norm": out.norm, **out.logs}
    return out._replace(grads=grads, factor=torch.ones_like(out.factor), norm=None, logs=logs)


# --- optimizers -------------------------------------------------------------------------------------------------------
def _coords(g: Grad) -> tuple[tuple[str, int, int], ...]:
    return tuple((a, g.env.mesh.axes[a].size, g.env.mesh.index(a)) for a in g.layout.sharded)


def _placed(g: Grad, tx: GradientTransformation) -> Grad:
    """g as this optimizer may read it: a mean, and whole leaves where it needs them."""
    g = value(g, tx.name)
    if not tx.elementwise and any(g.env.mesh.axes[a].size > 1 for a in g.layout.sharded):
        why = f"it is not known to work value by value, but the leaves are cut over {list(g.layout.sharded)} here; write fz.lift(pair), which tries it, or leave the bracket out"
        raise refuse(g, tx.name, why)
    return g


def _rewrite(g: Grad, tx: GradientTransformation) -> Grad:
    """An optimizer that is not the last: its updates are the gradient of the next."""
    g, key = _placed(g, tx), slot_name(g, tx.name)
    dtype = g.env.policy.params

    def init(params: Any) -> dict[str, Any]:
        return {key: tx.init(params.at(_coords(g), dtype).trainable().tree())}

    def fn(out: Out, state: dict[str, Any]) -> tuple[Out, dict[str, Any]]:
        grads = out.grads.to(dtype).map(lambda b: b * out.factor.to(b.dtype))
        updates, own = tx.update(grads.tree(), state[key], state["params"].trainable().tree())
        return rewritten(out, _packed(updates, grads)), {**state, key: tree.where(out.ok, own, state[key])}

    return after(g, tx.name, g.layout, fn, init)


def _apply_update(g: Grad, tx: GradientTransformation) -> Grad:
    """The last optimizer: the masters are read and written only here. Right of it grads are new parameters."""
    g, key = _placed(g, tx), slot_name(g, tx.name)
    dtype, donate = g.env.policy.params, g.env.donate

    def init(params: Any) -> dict[str, Any]:
        masters = params.at(_coords(g), dtype)
        mine = masters.trainable()
        return {"params": masters, key: tx.init(mine if tx.apply is not None else mine.tree())}

    def fused(out: Out, state: dict[str, Any]) -> tuple[Slots, Any, dict[str, Tensor]]:
        mine, own = state["params"].trainable(), state[key]
        grads = out.grads.to(dtype)
        if not donate:  # the same kernel, on clones
            mine, own = tree.clone(mine), tree.clone(own)
        return tx.apply(mine, grads, out.factor, own, out.ok)  # type: ignore[misc]

    def plain(out: Out, state: dict[str, Any]) -> tuple[Slots, Any, dict[str, Tensor]]:
        mine = state["params"].trainable()
        grads = out.grads.to(dtype).map(lambda b: b * out.factor.to(b.dtype))
        updates, own = tx.update(grads.tree(), state[key], mine.tree())
        moved = mine.map(torch.add, _packed(updates, mine))
        return tree.where(out.ok, moved, mine), tree.where(out.ok, own, state[key]), {}

    def fn(out: Out, state: dict[str, Any]) -> tuple[Out, dict[str, Any]]:
        new, own, logs = (plain if tx.apply is None else fused)(out, state)
        units = new.where.structure.units
        params = Slots(tuple(old if u.frozen else b for b, old, u in zip(new.buffers, state["params"].buffers, units, strict=True)), new.where)
        return out._replace(grads=params, logs={**out.logs, **logs}), {**state, "params": params, key: own}

    return after(g, tx.name, replace(g.layout, applied=True), fn, init)


def _packed(updates: Any, like: Slots) -> Slots:
    """A tree of this rank's leaves back in buffers."""
    structure = like.where.structure
    flat = structure.treedef.flatten_up_to(updates)
    by_leaf: list[Tensor | None] = [None] * len(structure.leaves)
    for place, x in zip(structure.places, flat, strict=True):
        by_leaf[place] = None if structure.frozen(place) else x
    buffer = like.buffers[0]
    return like.where.pack(by_leaf, buffer.dtype, buffer.device)

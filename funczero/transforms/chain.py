"""Composition: parts become a gradient, and whatever cannot mean what it says is refused here, in any process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from funczero.comm.edge import Edge, joined
from funczero.core.optimizer import GradientTransformation
from funczero.core.transform import refuse
from funczero.core.types import ChainError, Env, Grad, Transform
from funczero.transforms.feedback import kept_where_skipped
from funczero.transforms.partition import Partition
from funczero.transforms.shares import Optimizer, foreign
from funczero.transforms.update import apply_update, rewrite


class Source(NamedTuple):
    """A gradient not yet built: brackets that open left of it still add their axis, and what follows is inside them."""

    name: str
    make: Callable[[Source, Env], Grad]
    batch: tuple[str, ...]
    units: tuple[str, ...] = ()
    frozen: Callable[[str], bool] = lambda path: False
    axes: tuple[str, ...] = ()  # brackets open left of it, outermost first: what parameters at rest are split over
    scatter: tuple[str, ...] = ()  # brackets that open directly right of it: the seam scatters for them
    edges: tuple[Edge, ...] = ()  # of those brackets
    transforms: tuple[Any, ...] = ()
    # (second name, first name) of leaves that are one, whatever tree they come in
    ties: tuple[tuple[str, str], ...] = ()
    patterns: tuple[tuple[str, str], ...] = ()  # (who, regex): each must find a parameter
    replicated: tuple[str, ...] = ()  # mesh axes whose ranks are meant to be given the same rows
    synced: bool = False  # does a layer take statistics over the rows of all ranks?
    conditional: tuple[str, ...] = ()  # of the units, those that a rank may leave out where others open them
    cut: Any = 0  # of the batch, see rows.py
    spec: Any = None  # of the batch, where it is more than rows in dim 0
    beside: tuple[str, ...] = ()  # what its loss does beside one forward and backward that an update sends for


class Bracket(NamedTuple):
    """`shard(axis, *parts)` right of a Source."""

    edge: Edge
    parts: tuple[Any, ...]
    crossed: Callable[[Grad, Bracket], Grad]
    opened: bool = False  # the Source already scatters over it, at the seam

    @property
    def axis(self) -> str:
        """The mesh axis that it cuts over."""
        return self.edge.axis


@dataclass(frozen=True)
class Summed:
    """`all_reduce(axis)`: a scatter and a gather. Directly right of a Source with units the seam scatters for it."""

    name: str
    axis: str
    both: Transform
    gather: Transform  # what is left to do where the Source scatters

    def __call__(self, g: Grad) -> Grad:
        """g with the sum taken."""
        return self.both(g)


class Configure(NamedTuple):
    """A part that changes the Source, wherever it stands."""

    name: str
    source: Callable[[Source], Source]


class Lift(NamedTuple):
    """An optimizer in its place; the last one of a chain applies the update."""

    tx: Optimizer
    applies: bool


def build(parts: Sequence[Any], env: Env) -> Grad:
    """A gradient from a Source and the parts to its right."""
    if not parts or not isinstance(parts[0], Source):
        first = _name(parts[0]) if parts else "nothing"
        raise ChainError(
            f"chain: it begins with {first}, but a chain begins with a gradient; write value_and_grad(loss_fn,"
            " batch=...) or pullback() first"
        )
    source, *rest = parts
    if source.axes and rest:
        inside = " | ".join((source.name, *(_name(p) for p in source.transforms)))
        raise ChainError(
            f"{_name(rest[0])}: it stands after the bracket that holds the parameters at rest, which has no closing"
            f" edge; move it inside: shard({source.axes[-1]!r}, {inside.replace(' | ', ', ')},"
            f" {', '.join(map(_name, rest))})\n "
            f" {''.join(f'{a}[ ' for a in source.axes)}{inside}{' ]' * len(source.axes)} | {_name(rest[0])}  <- here"
        )
    source, marked = configured(parts), _mark(_flatten((*source.transforms, *rest)))
    edges = _edges((*source.edges, *_bracketed(marked)), source, env)
    for axis in (*edges, *source.axes, *source.batch):
        if axis not in env.mesh.axes:
            raise ChainError(
                f"{source.name}: {axis!r} is not an axis of the mesh ({env.mesh}); write one of {list(env.mesh.axes)}"
            )
    if source.units:
        source, marked = _open_at_seam(source, marked, env.sums == "tree" and not env.differentiable)
    _once_an_update(source, edges)
    g = _counted(fold(source.make(source, env._replace(edges=edges)), marked), source)
    _all_used(source, env)
    if env.differentiable:
        no_wires("differentiable", g.env.edges.values())
    return kept_where_skipped(g)


def _counted(g: Grad, source: Source) -> Grad:
    """g, whose Source knows how many micro-batches an update has.

    Raises:
      ChainError: a layer takes statistics over ranks, and there is more than one micro-batch a rank.
    """
    apply, of = g.apply, g.layout.stride
    if source.synced and any(name == "accumulate" for name, _ in g.layout.order):
        why = (
            "a SyncBatchNorm takes its statistics over the rows of all ranks at once, and which micro-batches are at"
            " once is another question at every stage"
        )
        raise refuse(g, source.name, f"{why}; leave accumulate out, or use BatchNorm, whose statistics are averaged")
    return g._replace(
        apply=lambda views, state, batch, seed: apply(views, state, batch, seed._replace(of=seed.micros or of))
    )


def _once_an_update(source: Source, edges: dict[str, Edge]) -> None:
    """Refuse differences where parameters are gathered in every forward and backward, of which nobody keeps a copy."""
    for axis in source.axes:
        if edges[axis].gather.difference:
            why = (
                f"{edges[axis].gather} sends what is new since the last time, once an update, but parameters that rest"
                " sharded are gathered in every forward and backward, and dropped after it"
            )
            remedy = f"write the wire inside it here, or shard({axis!r}, ...) right of {source.name}"
            raise ChainError(f"shard({axis!r}): {why}; {remedy}")


def no_wires(who: str, edges: Iterable[Edge]) -> None:
    """Refuse wires where derivatives are asked for.

    Raises:
      ChainError: an edge packs what it sends.
    """
    packed = next((e for e in edges if not e.exact), None)
    if packed is not None:
        what = f"the wire over {packed.axis!r} ({packed}) rounds what it sends, and has no derivative"
        raise ChainError(f"{who}: {what}; leave it out of this chain")


def _all_used(source: Source, env: Env) -> None:
    """Refuse a mesh axis along which every rank would train a model of its own, unless that is said to be meant."""
    for axis in (*source.replicated, *env.mesh.axes):
        if axis not in env.mesh.axes:
            raise ChainError(
                f"{source.name}: replicated names {axis!r}, which is not an axis of the mesh ({env.mesh}); write one of"
                f" {list(env.mesh.axes)}"
            )
        if axis in source.batch and axis in source.replicated:
            raise ChainError(
                f"{source.name}: the batch is split over {axis!r}, so its ranks are not given the same rows; leave it"
                " out of replicated"
            )
        if axis not in source.batch + source.replicated and env.mesh.axes[axis].size > 1:
            axes = (*source.batch, axis)
            spec = f"P({axis!r})" if len(axes) == 1 else f"P({axes!r})"
            raise ChainError(
                f"{source.name}: nothing is split or summed over the mesh axis {axis!r} of size"
                f" {env.mesh.axes[axis].size}, so every rank along it would train a model of its own; write"
                f" batch={spec}, or {source.name}(..., replicated=({axis!r},)) if its ranks are given the same rows"
            )


def fold(g: Grad, parts: Sequence[Any]) -> Grad:
    """g, then every part in order."""
    for part in parts:
        if isinstance(part, Bracket):
            g = part.crossed(g, part)
        elif isinstance(part, Lift):
            g = apply_update(g, part.tx) if part.applies else rewrite(g, part.tx)
        elif isinstance(part, Source):
            raise refuse(
                g, part.name, "a chain has one gradient, at its left end; write a second chain for a second loss"
            )
        elif foreign(part):
            raise refuse(g, _name(part), str(foreign(part)))
        elif callable(part):
            g = part(g)
        else:
            raise refuse(
                g,
                _name(part),
                "this is neither a transform nor an optimizer; write a function Grad -> Grad or an (init, update) pair",
            )
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
    source: Source = parts[0]
    for configure in _configures(_flatten((*source.transforms, *parts[1:]))):
        source = configure.source(source)
    return source


def _configures(parts: Sequence[Any]) -> list[Configure]:
    return [
        c
        for p in parts
        for c in ([p] if isinstance(p, Configure) else _configures(p.parts) if isinstance(p, Bracket) else [])
    ]


def _is_optimizer(part: Any) -> bool:
    own = isinstance(part, (Source, Bracket, Configure, Lift))
    return (
        isinstance(part, Partition)
        or not own
        and callable(getattr(part, "init", None))
        and callable(getattr(part, "update", None))
    )


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
                f"{_name(found[-1][1])}: it stands in another bracket than {_name(p)} before it, but an update is"
                " applied once, with the last optimizer; put both inside the same bracket\n "
                f" {' | '.join(_name(p) for p in parts)}"
            )

    def replaced(parts: Sequence[Any], path: tuple[int, ...]) -> tuple[Any, ...]:
        out: list[Any] = []
        for i, p in enumerate(parts):
            if isinstance(p, Bracket):
                out.append(p._replace(parts=replaced(p.parts, (*path, i))))
            elif _is_optimizer(p):
                tx = (
                    p
                    if isinstance(p, (GradientTransformation, Partition))
                    else GradientTransformation(p.init, p.update, name=type(p).__name__)
                )
                out.append(Lift(tx, (*path, i) == last))
            elif not isinstance(p, Configure):
                out.append(p)
        return tuple(out)

    return replaced(parts, ())


def _bracketed(parts: Sequence[Any]) -> list[Edge]:
    """The edges of brackets, outermost first."""
    return [e for p in parts if isinstance(p, Bracket) for e in (p.edge, *_bracketed(p.parts))]


def _edges(bracketed: Sequence[Edge], source: Source, env: Env) -> dict[str, Edge]:
    """How every axis is crossed: those of brackets first and outermost first, then the other axes of the mesh.

    Raises:
      ChainError: a wire cannot be meant, or an axis is given two for one direction.
    """

    def known(e: Edge) -> Edge:
        return e._replace(sums=env.sums, adds=env.policy.accumulate)

    try:
        out = {a: known(e).proven(env.policy.compute, env.mesh.device) for a, e in joined(bracketed).items()}
    except (TypeError, ValueError) as error:
        raise ChainError(f"{source.name}: {error}") from None
    return out | {a: known(Edge(a)) for a in env.mesh.axes if a not in out}


def opening(edge: Edge) -> str:
    """A bracket's opening edge in a printed chain."""
    return f"shard({edge.axis!r}," if edge.exact else f"shard({edge.axis!r}, {edge},"


def _open_at_seam(source: Source, parts: tuple[Any, ...], sums: bool) -> tuple[Source, tuple[Any, ...]]:
    """Brackets that open directly right of a Source with units scatter each unit's gradient as soon as it exists.

    Args:
      sums: so does a sum over an axis, which is then gathered where it stands.
    """
    first = parts[0] if parts else None
    axis = first.axis if isinstance(first, Bracket) or sums and isinstance(first, Summed) else None
    if axis not in source.batch or axis in (*source.axes, *source.scatter):
        return source, parts
    opened = source._replace(scatter=(*source.scatter, axis))
    if isinstance(first, Summed):
        return opened, (first.gather, *parts[1:])
    assert isinstance(first, Bracket)
    source, inner = _open_at_seam(opened, first.parts, sums)
    return source, (first._replace(parts=inner, opened=True), *parts[1:])

"""A step in words: its chain with the layout at every arrow, and what it cannot promise."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from funczero.comm.edge import Edge
from funczero.core.types import Grad
from funczero.layout.structure import Structure
from funczero.layout.where import Where
from funczero.transforms.chain import Source


def describe(g: Grad, source: Source, masters: Where | None = None) -> str:
    """The chain with the layout at every arrow, what its optimizers send of their own, and what it cannot promise.

    Args:
      masters: where the parameters lie, once a state was made: then what a forward gathers whole is named, in bytes.
    """
    depth, lines = 0, []
    for name, layout in zip(g.names, g.arrows, strict=True):
        depth -= name == ")"
        lines.append(
            (f"{'  ' * depth}{name}", "" if name.startswith("shard(") and layout.batch == () else layout.describe())
        )
        depth += name.startswith("shard(")
    wide = max(len(a) for a, _ in lines)
    notes = []
    if g.layout.rest and not source.units:
        notes.append(
            "parameters are gathered whole in every forward; name their blocks with value_and_grad(...,"
            " units=('blocks',)) to hold two at a time"
        )
    if masters is not None and g.layout.rest:
        notes.append(gathered(g, masters.structure, conditional=source.conditional))
    if source.conditional and g.layout.rest:
        notes.append(
            f"ranks need not run the same blocks of {list(source.conditional)}: they agree on every unit before it is"
            " gathered, and none is gathered ahead"
        )
    odd = {a: n for a, n in g.layout.order if n & (n - 1)}
    edges = g.env.edges.values()
    if g.env.exact and all(e.exact for e in edges):
        notes.append(
            "sums are exact: the same bits on any number of ranks, at any stage, whoever has which micro-batch"
        )
    elif odd:
        more = ", and in other orders of these sums (stages 2 and 3 against 0 and 1)" if len(g.layout.order) > 1 else ""
        notes.append(
            f"{odd} is no power of two: the same bits at every run of this world, other bits in other worlds{more}"
        )
    if g.env.model is not None:
        of = g.layout.stride
        once = f"moved once by the {of} micro-batches of an update" if of > 1 else "moved by every update"
        notes.append(f"model state: {g.env.model}, {once}")
    notes += [] if g.env.capture is None else g.env.capture.notes()
    if any(e.sums == "backend" for e in edges):
        notes.append("gradients are added over ranks by the backend: the same-bits promise is off")
    notes += g.notes(masters)
    notes += [_packs(e, g.env.mesh.axes[e.axis].size) for e in edges if not e.exact]
    head = f"train_step on {g.env.mesh} ({g.env.mesh.device.type}), {g.env.policy}{', donated' if g.env.donate else ''}"
    return "\n".join(
        [head, *(f"  {a:<{wide}}  -> {b}" if b else f"  {a}" for a, b in lines), *(f"  note: {n}" for n in notes)]
    )


def gathered(g: Grad, structure: Structure, least: int = 0, conditional: Sequence[str] = ()) -> str:
    """What a forward gathers whole, where parameters rest in shards, and which blocks travel together.

    Args:
      least: "" where it is less than so many bytes, or no more than two blocks hold.
      conditional: units that not every rank opens, where each travels by itself.
    """
    wide = g.env.policy.compute.itemsize
    size = lambda leaves: wide * sum(prod(structure.leaves[i].shape) for i in leaves)
    blocks: dict[str, list[int]] = {}
    for unit, members in zip(structure.units, structure.members, strict=True):
        if unit.seam:
            blocks.setdefault(unit.name, []).extend(members)
    rest = [i for unit, m in zip(structure.units, structure.members, strict=True) if not unit.seam for i in m]
    rest.sort(key=lambda i: -prod(structure.leaves[i].shape))
    largest = max(map(size, blocks.values()), default=0)
    if least and size(rest) <= max(least, 2 * largest):
        return ""
    named = ", ".join(f"{structure.leaves[i].path!r} ({_bytes(size([i]))})" for i in rest[:3])
    more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
    limit, smallest = g.env.link.together, min(map(size, blocks.values()), default=0)
    alone = conditional or 2 * smallest > limit
    how = "two at a time" if alone else f"up to {_bytes(limit)} of neighbours together, two such messages at a time"
    turns = f"; {len(blocks)} blocks of at most {_bytes(largest)} by turns, {how}" if blocks else ""
    whole = (
        f"gathered whole in every forward are {_bytes(size(rest))}: {named}{more}"
        if rest
        else "nothing is gathered whole"
    )
    return whole + turns


def _bytes(n: int) -> str:
    return next(
        f"{n / k:.3g} {name}" for name, k in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1)) if n >= k or k == 1
    )


def _packs(edge: Edge, size: int) -> str:
    """What a wire means for the values."""
    if size == 1:
        return f"nothing travels over {edge.axis!r}, whose size is 1, so {edge} packs nothing there"
    return (
        f"what travels over {edge.axis!r} is packed ({edge}): all ranks read the same, and other bits than those of the"
        " chain without wires"
    )

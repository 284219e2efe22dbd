"""A step in words: its chain with the layout at every arrow, and what it cannot promise."""

from __future__ import annotations

from funczero.comm.edge import Edge
from funczero.core.types import Grad
from funczero.layout.where import Where
from funczero.transforms.chain import Source


def describe(g: Grad, source: Source, masters: Where | None = None) -> str:
    """The chain with the layout at every arrow, what its optimizers send of their own, and what it cannot promise.

    Args:
      masters: where the parameters lie, once that is known.
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
    odd = {a: n for a, n in g.layout.order if n & (n - 1)}
    if odd:
        more = ", and in other orders of these sums (stages 2 and 3 against 0 and 1)" if len(g.layout.order) > 1 else ""
        notes.append(
            f"{odd} is no power of two: the same bits at every run of this world, other bits in other worlds{more}"
        )
    edges = g.env.edges.values()
    if any(e.sums == "backend" for e in edges):
        notes.append("gradients are added over ranks by the backend: the same-bits promise is off")
    notes += g.notes(masters)
    notes += [_packs(e, g.env.mesh.axes[e.axis].size) for e in edges if not e.exact]
    head = f"train_step on {g.env.mesh} ({g.env.mesh.device.type}), {g.env.policy}{', donated' if g.env.donate else ''}"
    return "\n".join(
        [head, *(f"  {a:<{wide}}  -> {b}" if b else f"  {a}" for a, b in lines), *(f"  note: {n}" for n in notes)]
    )


def _packs(edge: Edge, size: int) -> str:
    """What a wire means for the values."""
    if size == 1:
        return f"nothing travels over {edge.axis!r}, whose size is 1, so {edge} packs nothing there"
    return (
        f"what travels over {edge.axis!r} is packed ({edge}): all ranks read the same, and other bits than those of the"
        " chain without wires"
    )

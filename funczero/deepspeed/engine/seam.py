"""The Source of an engine at stage 3, whose backward has sent the units' gradients already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from funczero.core.types import ChainError, Env, Grad, Seed, Sum
from funczero.gradients.arrivals import Collected
from funczero.gradients.pullback import pullback
from funczero.gradients.source import close
from funczero.gradients.tape import Tape
from funczero.layout.spec import P
from funczero.transforms.chain import Source
from funczero.transforms.exact import noted


def seam_pullback(batch: P, trainable: Callable[[str], bool], units: tuple[str, ...]) -> Source:
    """As fz.pullback, with units.

    A pull that `scatters` is asked for this rank's part, because its backward has sent the units already. Another one,
    as fz.pull's, returns whole gradients, which are scattered here.
    """
    plain = pullback(batch, trainable)

    def make(source: Source, env: Env) -> Grad:
        g = plain.make(source, env)
        odd = next((e for a, e in env.edges.items() if a in g.layout.sharded and e.scatter.memory is not None), None)
        if odd is not None:
            why = "an engine keeps no memory of what its backwards sent"
            raise ChainError(f"shard({odd.axis!r}): {odd.scatter}: {why}; write the wire inside it")

        def apply(views: Any, state: dict[str, Any], micro: Any, seed: Seed) -> tuple[Sum, dict[str, Any]]:
            pull, loss, weight = micro
            loss, weight = (torch.as_tensor(x, device=views.buffers[0].device).detach() for x in (loss, weight))
            cotangent = seed.cotangent.to(loss.dtype)
            key = seed.key, seed.index
            if getattr(pull, "scatters", False):
                closed = pull(cotangent, seed.look, key, seed.grid)
            else:
                closed = _scattered(Tape(views, (), env, seed.look, key=key, grid=seed.grid), pull(cotangent))
            out = Sum(loss[None], weight[None], None, closed.grads, bad=closed.bad)
            return out if closed.tally is None else noted(out, closed.tally), state

        return g._replace(apply=apply)

    return plain._replace(make=make, units=units)


def _scattered(tape: Tape, whole: Any) -> Collected:
    """A tree of whole gradients as this rank's part."""
    structure = tape.whole.structure
    grads: list[Any] = [None] * len(structure.leaves)
    for place, g in zip(structure.places, structure.treedef.flatten_up_to(whole), strict=True):
        if g is not None and not structure.frozen(place):
            grads[place] = g if grads[place] is None or g is grads[place] else grads[place] + g
    zero = lambda i: torch.zeros(structure.leaves[i].shape, dtype=tape.dtype, device=tape.port.device)
    for u, unit in enumerate(structure.units if tape.seam else ()):
        if unit.seam and not unit.frozen:
            tape.arrivals.put(u, [zero(i) if grads[i] is None else grads[i] for i in structure.members[u]])
    return close(tape, grads)

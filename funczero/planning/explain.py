"""`explain`: a step as straight-line verbs, with bytes and layout, as they follow one another in an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from funczero.planning.plan import Plan, plan
from funczero.planning.trace import Verb
from funczero.planning.words import amount, columns
from funczero.step.step import Step

VERBS = {"gather": "gather", "scatter": "reduce_scatter", "sum": "all_reduce"}


class Explained(NamedTuple):
    """A step in verbs; printed, it is a line each."""

    head: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.head, *self.lines])


def explain(
    step: Step, params: Any = None, batch: Any = None, mesh: Mapping[str, int] | None = None, rank: int = 0
) -> Explained:
    """What one rank does in an update, line by line: gathers, forwards, backwards, sums, the update.

    The lines are those of `plan`: the step itself runs, without values. What is computed between two messages is one
    line, which begins where its first product of matrices does.

    Args:
      step, params, batch, mesh, rank: as plan's.

    Raises:
      TypeError, ValueError: as plan.

    >>> import torch, funczero as fz
    >>> loss = lambda params, batch: (((batch @ params["w"]) ** 2).sum(), batch.new_tensor(len(batch)))
    >>> step = fz.train_step(
    ...     *fz.zero(fz.value_and_grad(loss, batch=fz.P("data")), fz.sgd(0.1), stage=1), mesh={"data": 4})
    >>> print(explain(step, {"w": torch.ones(64, 32)}, torch.ones(8, 64)))
    one update on data=4, as rank 0 makes it; bytes are those that it sends
      forward                                           8.19 kFLOPs
      backward                                          8.19 kFLOPs
      reduce_scatter  data  the rest  float32  6.14 kB  sum of whole -> ['data']
      all_reduce      data  numbers   int64    1.46 kB
      update
      gather          data  the rest  float32  6.14 kB  ['data'] -> whole
    """
    return explained(plan(step, params, batch, mesh, rank=rank))


def explained(found: Plan) -> Explained:
    """A plan in verbs."""
    ranks = " x ".join(f"{axis}={n}" for axis, n in found.mesh.items()) or "one process"
    head = f"one update on {ranks}, as rank {found.rank} makes it; bytes are those that it sends"
    rows = [_row(verb, found) for verb in _joined(found.verbs)]
    return Explained(head, tuple(columns(rows, indent=1, left=6)) if rows else ("  nothing",))


def _joined(verbs: Sequence[Verb]) -> list[Verb]:
    """Messages, and between them the work of each phase in one; waits and work without products are left out."""
    out: list[Verb] = []
    for verb in verbs:
        last = out[-1] if out else None
        if verb.what == "wait" or verb.what == "compute" and not verb.flops and verb.phase != "update":
            continue
        if last is not None and verb.what == last.what == "compute" and verb.phase == last.phase:
            out[-1] = last._replace(flops=last.flops + verb.flops)
        else:
            out.append(verb)
    return out


def _row(verb: Verb, found: Plan) -> tuple[str, ...]:
    """verb, axis, whose values, as what, bytes, layout or work."""
    if verb.what == "compute":
        return (verb.phase, "", "", "", "", f"{count(verb.flops)}FLOPs" if verb.flops else "")
    names = list(dict.fromkeys(found.units[u] or "the rest" for u in verb.units))
    whose = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0] if names else "numbers"
    return (VERBS.get(verb.what, verb.what), verb.axis, whose, verb.form, amount(verb.nbytes), _layout(verb, found))


def _layout(verb: Verb, found: Plan) -> str:
    """How values lie before and after, as far as brackets say."""
    if verb.axis not in found.brackets or not verb.units or verb.what not in ("gather", "scatter"):
        return ""
    place = found.brackets.index(verb.axis)
    inside, outside = (list(found.brackets[:n]) or "whole" for n in (place + 1, place))
    return f"{inside} -> {outside}" if verb.what == "gather" else f"sum of {outside} -> {inside}"


def count(n: int) -> str:
    """A number in three digits.

    >>> count(1234), count(12)
    ('1.23 k', '12 ')
    """
    steps = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next((f"{n / k:.3g} {name}" for name, k in steps if n >= k), f"{n} ")

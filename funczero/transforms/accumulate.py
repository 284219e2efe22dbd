"""Sums over time: more micro-batches before the update, in the one tree."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from funczero.comm.exact import Grid
from funczero.core import order, rows
from funczero.core.exhausted import asking
from funczero.core.spans import span
from funczero.core.transform import refuse, slot_name
from funczero.core.types import Apply, Grad, Seed, State, Sum, Transform, Tree
from funczero.layout.slots import Slots
from funczero.transforms import exact


class Accumulate(NamedTuple):
    """A streaming accumulate's state: micro-batches taken, and one partial sum for every set bit of their number."""

    count: torch.Tensor  # type: ignore[assignment]  # in place of the tuple's method
    partial: tuple[Sum, ...]

    def total(self, wide: torch.dtype) -> Sum:
        """The sum so far in a dtype; of a window that holds at least one micro-batch."""
        return order.close(self.partial, lambda a, b: _add(a, b, wide))


def accumulate(k: int, stream: bool = False) -> Transform:
    """The sum of k micro-batches; law: accumulate(1) is the identity, and k micro-batches are one big batch.

    Layout: unchanged; a digit is added to the order of sums. Memory: log2(k) + 1 partial sums in `policy.accumulate`;
    one of 8 bytes a value where sums are exact.

    Args:
      k: micro-batches; the rows of the batch are cut into k, and what has no rows is in each of them.
      stream: take one micro-batch a call and return no metrics (None); a call with batch None hands over the sum and
        updates. A short window closes with what it has. Only the last accumulate of a chain may stream.
    """
    name = f"accumulate({k}{', stream=True' if stream else ''})"
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"accumulate: k={k!r} is not a number of micro-batches; write an int of at least 1")

    def transform(g: Grad) -> Grad:
        if k == 1 and not stream:
            return g
        if stream and g.env.differentiable:
            raise refuse(g, name, "a window over many calls is no function of one batch; leave stream=True out here")
        if g.layout.mean:
            raise refuse(g, name, "it adds up sums, but the mean is already taken; put it further left")
        if g.streams:
            why = "an accumulate left of it streams, and only the last one of a chain may"
            raise refuse(g, name, f"{why}; write stream=True here instead")
        layout = replace(g.layout, order=(*g.layout.order, ("accumulate", k)))
        names, arrows = (*g.names, name), (*g.arrows, layout)
        wider = g._replace(layout=layout, names=names, arrows=arrows)
        if not stream:
            looped = _loop(g, k, name)
            return wider._replace(apply=looped, fresh=looped)
        key = slot_name(g, "accumulate")
        init = lambda params: {**g.init(params), key: _empty()}
        return wider._replace(init=init, apply=_window(g, k, name, key), streams=True)

    transform.__name__ = name
    return transform


def _loop(g: Grad, k: int, name: str) -> Apply:
    """g on k parts of a batch, one after another."""
    stride, wide, reuse = g.layout.stride, g.env.policy.accumulate, g.owned and not g.env.differentiable
    cut = g.layout.cut

    def apply(views: Slots, state: State, batch: Tree, seed: Seed) -> tuple[Sum, State]:
        counter: order.Counter[Sum] = ()
        for j, micro in enumerate(rows.split(batch, k, name, cut)):
            out, state = g.apply(views, state, micro, seed._replace(index=seed.index + j * stride))
            assert isinstance(out, Sum)
            with span(name), asking(lambda: f"in {name}"):
                counter = _taken(counter, j, out, seed.grid, wide, reuse)
        with span(name), asking(lambda: f"in {name}"):
            return order.close(counter, lambda a, b: _add(a, b, wide, reuse)), state

    return apply


def _window(g: Grad, k: int, name: str, key: str) -> Apply:
    """g on one micro-batch a call, in a window of at most k; a batch of None closes it."""
    stride, wide = g.layout.stride, g.env.policy.accumulate

    def apply(views: Slots, state: State, batch: Tree, seed: Seed) -> tuple[Sum | None, State]:
        window: Accumulate = state[key]
        j = int(window.count)
        if batch is None:
            with span(name), asking(lambda: f"in {name}"):
                return _handed_over(window, wide, name, g.env.donate), {**state, key: _empty()}
        if j == k:
            raise ValueError(f"{name}: the window already holds {k} micro-batches; call step(state, None) to update")
        out, state = g.apply(views, state, batch, seed._replace(index=seed.index + j * stride))
        assert isinstance(out, Sum)
        with span(name), asking(lambda: f"in {name}"):
            partial = _taken(window.partial, j, out, seed.grid, wide)
        return None, {**state, key: Accumulate(window.count + 1, partial)}

    return apply


def _handed_over(window: Accumulate, wide: torch.dtype, name: str, donate: bool) -> Sum:
    """The sum of a window, in memory that is not the state's, unless it is donated."""
    count = int(window.count)
    if count == 0:
        why = "there is nothing to hand over, because no micro-batch came since the last update"
        raise ValueError(f"{name}: {why}; call step(state, micro_batch) first")
    out = window.total(wide)
    if not donate and len(window.partial) == 1:  # one partial sum, which is the state's tensor
        return out._replace(grads=out.grads.map(torch.clone))
    return out


def _empty() -> Accumulate:
    return Accumulate(torch.zeros((), dtype=torch.int64), ())


def _taken(
    counter: order.Counter[Sum], count: int, out: Sum, grid: Grid | None, wide: torch.dtype, reuse: bool = False
) -> order.Counter[Sum]:
    """The partial sums of `count` summands and one more; of integers, which have no order, there is one."""
    if grid is None:
        return order.push(counter, count, out, lambda a, b: _add(a, b, wide, reuse))
    if not counter:
        return (exact.counted(out, grid),)
    return (_beside(counter[0], out, exact.added(counter[0], out, grid, reuse)),)


def _add(a: Sum, b: Sum, wide: torch.dtype, reuse: bool = False) -> Sum:
    """The sum of two partial sums, in the accumulate dtype; what is stacked per micro-batch is joined in order of time.

    With reuse, a's memory may be the result's: nobody else has seen it.
    """
    if reuse and a.grads.buffers[0].dtype == wide:
        torch._foreach_add_(list(a.grads.buffers), [x.to(wide) for x in b.grads.buffers])
        grads = a.grads
    else:
        grads = Slots(
            tuple(x.to(wide) + y.to(wide) for x, y in zip(a.grads.buffers, b.grads.buffers, strict=True)), a.grads.where
        )
    return _beside(a, b, a._replace(grads=grads))


def _beside(a: Sum, b: Sum, both: Sum) -> Sum:
    """The sum of a and b, whose gradients are those of `both`."""
    counts = [None if x.micros is None else int(x.micros) for x in (a, b)]
    if counts[0] != counts[1]:
        said = ["as many as places" if n is None else str(n) for n in counts]
        why = f"micro-batches of one update were dealt out of batches of {said[0]} and of {said[1]}"
        raise ValueError(f"accumulate: {why}; deal one global batch with step.local_rows")
    aux = None if a.aux is None or b.aux is None else a.aux.joined(b.aux)
    bad = None if a.bad is None or b.bad is None else a.bad + b.bad
    moved = tuple(torch.cat([x, y]) for x, y in zip(a.moved, b.moved, strict=True))
    used = None if a.used is None or b.used is None else a.used + b.used
    loss, weight = torch.cat([a.loss, b.loss]), torch.cat([a.weight, b.weight])
    return both._replace(loss=loss, weight=weight, aux=aux, bad=bad, moved=moved, used=used)

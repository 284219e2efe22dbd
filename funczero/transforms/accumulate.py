"""Sums over time: more micro-batches before the update, in the one tree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from funczero.core import order, tree
from funczero.core.transform import refuse, slot_name
from funczero.core.types import Grad, Seed, Sum, Transform
from funczero.layout.slots import Slots


class Accumulate(NamedTuple):
    """A streaming accumulate's state: micro-batches taken, and one partial sum for every set bit of their number."""

    count: torch.Tensor
    partial: tuple[Sum, ...]

    def total(self, wide: torch.dtype) -> Sum:
        """The sum so far in a dtype; of a window that holds at least one micro-batch."""
        return order.close(self.partial, lambda a, b: _add(a, b, wide))


def accumulate(k: int, stream: bool = False) -> Transform:
    """The sum of k micro-batches; law: accumulate(1) is the identity, and k micro-batches are one big batch.

    Layout: unchanged; a digit is added to the order of sums. Memory: log2(k) + 1 partial sums in `policy.accumulate`.

    Args:
      k: micro-batches; the batch is cut into k along dim 0.
      stream: take one micro-batch a call and return no metrics (None); a call with batch None hands over the sum and
        updates. A short window closes with what it has. Only the last accumulate of a chain may stream.
    """
    name = f"accumulate({k}{', stream=True' if stream else ''})"
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"accumulate: k={k!r} is not a number of micro-batches; write an int of at least 1")

    def transform(g: Grad) -> Grad:
        if k == 1 and not stream:
            return g
        if g.layout.mean:
            raise refuse(g, name, "it adds up sums, but the mean is already taken; put it further left")
        if g.streams:
            raise refuse(
                g,
                name,
                "an accumulate left of it streams, and only the last one of a chain may; write stream=True here"
                " instead",
            )
        layout, stride = replace(g.layout, order=(*g.layout.order, ("accumulate", k))), g.layout.stride
        wide = g.env.policy.accumulate
        key = slot_name(g, "accumulate")

        def one(views: Any, state: dict[str, Any], micro: Any, seed: Seed, j: int) -> tuple[Sum, dict[str, Any]]:
            out, state = g.apply(views, state, micro, seed._replace(index=seed.index + j * stride))
            assert isinstance(out, Sum)
            return out, state

        def loop(views: Any, state: dict[str, Any], batch: Any, seed: Seed) -> tuple[Sum, dict[str, Any]]:
            counter: order.Counter = ()
            for j, micro in enumerate(tree.split_rows(batch, k, name)):
                out, state = one(views, state, micro, seed, j)
                counter = order.push(counter, j, out, lambda a, b: _add(a, b, wide, reuse=True))
            return order.close(counter, lambda a, b: _add(a, b, wide, reuse=True)), state

        def streamed(views: Any, state: dict[str, Any], batch: Any, seed: Seed) -> tuple[Sum | None, dict[str, Any]]:
            own: Accumulate = state[key]
            j = int(own.count)
            if batch is None:
                if j == 0:
                    raise ValueError(
                        f"{name}: there is nothing to hand over, because no micro-batch came since the last update;"
                        " call step(state, micro_batch) first"
                    )
                out = own.total(wide)
                # the state's own tensor otherwise
                fresh = out._replace(grads=out.grads.map(torch.clone)) if j & (j - 1) == 0 else out
                return fresh, {**state, key: _empty()}
            if j == k:
                raise ValueError(
                    f"{name}: the window already holds {k} micro-batches; call step(state, None) to update"
                )
            out, state = one(views, state, batch, seed, j)
            return None, {
                **state,
                key: Accumulate(own.count + 1, order.push(own.partial, j, out, lambda a, b: _add(a, b, wide))),
            }

        init = (lambda params: {**g.init(params), key: _empty()}) if stream else g.init
        return g._replace(
            init=init,
            apply=streamed if stream else loop,
            layout=layout,
            names=(*g.names, name),
            arrows=(*g.arrows, layout),
            streams=stream,
        )

    transform.__name__ = name
    return transform


def _empty() -> Accumulate:
    return Accumulate(torch.zeros((), dtype=torch.int64), ())


def _add(a: Sum, b: Sum, wide: torch.dtype, reuse: bool = False) -> Sum:
    """The sum of two partial sums, in the accumulate dtype; what is stacked per micro-batch is joined in order of time.

    With reuse, a's memory may be the result's: a loop's partial sums are its own.
    """
    if reuse and a.grads.buffers[0].dtype == wide:
        torch._foreach_add_(list(a.grads.buffers), [x.to(wide) for x in b.grads.buffers])
        grads = a.grads
    else:
        grads = Slots(
            tuple(x.to(wide) + y.to(wide) for x, y in zip(a.grads.buffers, b.grads.buffers, strict=True)), a.grads.where
        )
    aux = None if a.aux is None else (torch.cat([a.aux[0], b.aux[0]]), a.aux[1])
    bad = None if a.bad is None or b.bad is None else a.bad + b.bad
    return Sum(torch.cat([a.loss, b.loss]), torch.cat([a.weight, b.weight]), aux, grads, bad=bad)

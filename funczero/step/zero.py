"""The named chains: what the papers call a stage is where the bracket opens."""

from __future__ import annotations

from functools import reduce
from typing import Any

from funczero.comm.wire import Wire, as_born
from funczero.transforms.accumulate import accumulate as accumulate_
from funczero.transforms.chain import chain
from funczero.transforms.reduce import all_gather, all_reduce, reduce_scatter
from funczero.transforms.shard import shard


def zero(
    grad: Any,
    *transforms: Any,
    stage: int,
    axis: str | tuple[str, ...] = "data",
    accumulate: Any = 1,
    threshold: int = 0,
    gather: Wire = as_born,
    scatter: Wire = as_born,
) -> tuple[Any, ...]:
    """The chain of a ZeRO stage, to be handed on: train_step(*zero(grad, adamw(lr), stage=2), mesh=...).

    0: nothing is sharded. 1: optimizer state. 2: + gradients. 3: + parameters. All give the same bits.

    Args:
      grad: value_and_grad(...) or pullback().
      transforms: what works on the mean: scale_loss, clips, the optimizer last.
      stage: 0 to 3 (DeepSpeed: zero_optimization.stage).
      axis: the mesh axis, or axes outermost first, that state is sharded over.
      accumulate: micro-batches an update, or the parts that sum over time, as (accumulate(4, stream=True),).
      threshold: leaves with fewer elements stay whole.
      gather, scatter: how views and gradients travel over each of the axes, as shard's. A sum stays exact, at stage 0
        too.

    Raises:
      ValueError: there is no such stage, or no view travels at this one.

    Source: Rajbhandari et al., ZeRO, arXiv 1910.02054.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero: stage={stage!r} does not exist; write 0, 1, 2 or 3")
    if stage == 0 and gather is not as_born:
        raise ValueError(
            f"zero: gather={gather} packs views, and none travels at stage 0; leave it out, or write stage=1"
        )
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    acc = accumulate if isinstance(accumulate, tuple) else () if accumulate == 1 else (accumulate_(accumulate),)

    def bracket(*inside: Any) -> Any:
        how: dict[str, Any] = {"threshold": threshold, "gather": gather, "scatter": scatter}
        return reduce(lambda parts, a: (shard(a, *parts, **how),), reversed(axes), inside)[0]

    if stage == 0 and scatter is as_born:
        return chain(grad, acc, *(all_reduce(a) for a in axes), *transforms)
    if stage == 0:
        halves = (*(reduce_scatter(a, scatter) for a in axes), *(all_gather(a) for a in reversed(axes)))
        return chain(grad, acc, *halves, *transforms)
    if stage == 1:
        return chain(grad, acc, bracket(*transforms))
    if stage == 2:
        return chain(grad, bracket(*acc, *transforms))
    return chain(bracket(grad, *acc, *transforms))


def hpz(
    grad: Any, *transforms: Any, within: str = "local", across: str = "node", accumulate: int = 1
) -> tuple[Any, ...]:
    """ZeRO++'s secondary partition: parameters rest sharded within a node, gradients and state over both axes.

    Gradients cross nodes once an update. Source: Wang et al., ZeRO++, arXiv 2306.10209 (DeepSpeed:
    zero_hpz_partition_size).
    """
    acc = () if accumulate == 1 else (accumulate_(accumulate),)
    return chain(shard(within, grad, *acc, shard(across, *transforms)))


def mics(
    grad: Any, *transforms: Any, within: str = "local", across: str = "node", accumulate: int = 1
) -> tuple[Any, ...]:
    """MiCS, torch's HSDP: everything sharded within a node and replicated across. Source: Zhang et al., MiCS, arXiv
    2205.00119.
    """
    acc = () if accumulate == 1 else (accumulate_(accumulate),)
    return chain(shard(within, grad, *acc, all_reduce(across), *transforms))

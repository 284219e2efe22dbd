"""The named chains: what the papers call a stage is where the bracket opens."""

from __future__ import annotations

from functools import reduce
from typing import Any

from funczero.comm.quantised import int4, int8
from funczero.comm.wire import Wire, as_born
from funczero.transforms.accumulate import accumulate as accumulate_
from funczero.transforms.chain import chain
from funczero.transforms.reduce import all_gather, all_reduce, reduce_scatter
from funczero.transforms.shard import shard

WEIGHTS, GRADIENTS = int8(2048), int4(512)  # of ZeRO++


def zero(
    grad: Any,
    *transforms: Any,
    stage: int,
    axis: str | tuple[str, ...] = "data",
    accumulate: Any = 1,
    threshold: int = 0,
    gather: Wire = as_born,
    scatter: Wire = as_born,
    frozen: Wire | None = None,
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
      gather, scatter, frozen: how views, gradients and views that do not learn travel over each of the axes, as
        shard's. A sum stays exact, at stage 0 too.

    Raises:
      ValueError: there is no such stage, or no view travels at this one.

    Source: Rajbhandari et al., ZeRO, arXiv 1910.02054.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero: stage={stage!r} does not exist; write 0, 1, 2 or 3")
    for name, wire in (("gather", gather), ("frozen", frozen or as_born)):
        if stage == 0 and wire is not as_born:
            raise ValueError(
                f"zero: {name}={wire} packs views, and none travels at stage 0; leave it out, or write stage=1"
            )
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    acc = _summing(accumulate)

    def bracket(*inside: Any) -> Any:
        how: dict[str, Any] = {"threshold": threshold, "gather": gather, "scatter": scatter, "frozen": frozen}
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
    grad: Any, *transforms: Any, within: str = "local", across: str = "node", accumulate: Any = 1
) -> tuple[Any, ...]:
    """ZeRO++'s secondary partition: parameters rest sharded within a node, gradients and state over both axes.

    Gradients cross nodes once an update. Source: Wang et al., ZeRO++, arXiv 2306.10209 (DeepSpeed:
    zero_hpz_partition_size, zero_quantized_nontrainable_weights).
    """
    acc = _summing(accumulate)
    return chain(shard(within, grad, *acc, shard(across, *transforms)))


def zeropp(
    grad: Any,
    *transforms: Any,
    node: str = "node",
    local: str = "local",
    weights: Wire | tuple[Wire, Wire] = WEIGHTS,
    gradients: Wire | tuple[Wire, Wire] = GRADIENTS,
    secondary: bool = True,
    accumulate: Any = 1,
    each: bool = False,
    threshold: int = 0,
    frozen: Wire | None = None,
) -> tuple[Any, ...]:
    """ZeRO++: ZeRO-3 whose parameters cross nodes once an update in 8 bits, and whose gradients do in 4.

    Law: with wires that round nothing it gives the very bits of ZeRO-3. A sum over all ranks is taken within the node
    first, and only each rank's part of it crosses; it is rounded once an axis, whatever the world. The defaults are the
    paper's, and cost a small GPT 1.4 % of its loss; weights=difference(int4(1024)) with gradients=(int8(512), int4(128,
    hadamard=16)) cost it 0.03 % and send half as much of the weights (experiments/zeropp_parity.py). Bytes across nodes
    of an update, where M is the model in 16 bits: ZeRO-3 3M a micro-batch, here 0.75M and the scales; an axis of size
    1 is crossed by nothing.

    Args:
      grad: value_and_grad(..., batch=P((node, local))) or pullback(...).
      transforms: what works on the mean: scale_loss, clips, the optimizer last.
      node, local: the mesh axes between nodes and within one; the mesh is {node: nodes, local: ranks of a node}.
      weights: qwZ, how views cross nodes; or (within a node, across). Within a node they travel as they are.
      gradients: qgZ, how gradients travel; or (within a node, across).
      secondary: hpZ, parameters rest whole in every node, so that forwards and backwards gather within it; False: they
        cross nodes in every forward and backward, and take 1 / nodes of the memory.
      accumulate: micro-batches an update, or the parts that sum over time, as (accumulate(4, stream=True),).
      each: gradients cross nodes at every micro-batch, as in the paper, so that sums over time take 1 / nodes of the
        memory; False: once an update, so that bytes across nodes do not grow with the number of micro-batches.
      threshold: leaves with fewer elements stay whole.
      frozen: how views of leaves that do not learn cross nodes; by default as the others.

    Source: Wang et al., ZeRO++, arXiv 2306.10209 (DeepSpeed: zero_quantized_weights, zero_quantized_gradients,
    zero_hpz_partition_size).
    """
    acc = _summing(accumulate)
    inner, outer = _pair(weights, as_born)
    first, second = _pair(gradients)
    across = lambda *parts: shard(node, *parts, threshold=threshold, gather=outer, scatter=second, frozen=frozen)
    within = lambda *parts: shard(local, *parts, threshold=threshold, gather=inner, scatter=first)
    if not secondary:
        return chain(within(across(grad, *acc, *transforms)))
    if each:
        return chain(within(grad, across(*acc, *transforms)))
    return chain(within(grad, *acc, across(*transforms)))


def _summing(accumulate: Any) -> tuple[Any, ...]:
    """The parts that sum over time: those that were given, or accumulate of so many."""
    return accumulate if isinstance(accumulate, tuple) else () if accumulate == 1 else (accumulate_(accumulate),)


def _pair(wire: Wire | tuple[Wire, Wire], within: Wire | None = None) -> tuple[Wire, Wire]:
    """How the two axes are crossed, (within a node, across)."""
    if isinstance(wire, Wire):
        return wire if within is None else within, wire
    first, second = wire
    return first, second


def mics(
    grad: Any, *transforms: Any, within: str = "local", across: str = "node", accumulate: Any = 1
) -> tuple[Any, ...]:
    """MiCS, torch's HSDP: everything sharded within a node and replicated across. Source: Zhang et al., MiCS, arXiv
    2205.00119.
    """
    acc = _summing(accumulate)
    return chain(shard(within, grad, *acc, all_reduce(across), *transforms))

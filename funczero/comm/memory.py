"""Wires with memory: what rounding took from a sum goes into the next one; of views, only what is new travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.comm.wire import Memory, Wire, as_born
from funczero.layout.slots import Slots


def feedback(wire: Wire, decay: float = 0.0, every: int = 0) -> Wire:
    """A wire of gradients with error feedback: v = g + e is packed, and e <- decay * e + (1 - decay) * (v - read).

    Law: with decay=0 what was sent so far and the memory add up to the gradients so far. The memory is a leaf of the
    state, `feedback@<axis>`, one a rank of the axis, in the size of what is summed and in `policy.accumulate`; in a
    world of another size the ranks' memories are added, and the first rank has the sum. A skipped update keeps it as
    it was, but for the micro-batches that a stream has taken.

    Args:
      wire: what packs v, as fz.int4(512).
      decay: how much of the old memory stays; LoCo writes 0.8.
      every: sums after which the memory is emptied; 0: never. LoCo writes 1024.

    Raises:
      TypeError, ValueError: it is no wire that rounds, has memory already, or a number is out of range.

    Source: Seide et al., 1-bit SGD; Xie et al., LoCo, arXiv 2407.04480 (DeepSpeed before 0.19.8: zeropp_loco_param).

    >>> from funczero import int4
    >>> print(feedback(int4(512), decay=0.8, every=1024))
    feedback(int4(512), decay=0.8, every=1024)
    """
    _rounds(wire, "feedback")
    if not isinstance(decay, (int, float)) or isinstance(decay, bool) or not 0 <= decay < 1:
        raise ValueError(f"feedback: decay={decay!r} is no share; write a number from 0 up to, but not including, 1")
    if not isinstance(every, int) or isinstance(every, bool) or every < 0:
        raise ValueError(f"feedback: every={every!r} is no number of sums; write an int, 0 for never")
    more = (f", decay={decay:g}" if decay else "") + (f", every={every}" if every else "")

    def keep(sent: Tensor, read: Tensor, old: Tensor) -> Tensor:
        left = sent - read
        return old * decay + left * (1 - decay) if decay else left

    return wire._replace(name=f"feedback({wire}{more})", memory=Memory(keep, every))


def difference(wire: Wire) -> Wire:
    """A wire of views that packs what is new: w <- w + read(pack(parameter - w)), where w is what the readers hold.

    Law: what one update rounds away the next ones send, so that w follows the parameter; it is exact at the first
    update, and where an update is skipped it stays. For the edge that closes a bracket, which is crossed once an
    update. The readers' values are `state.views`; they are a state of their own, and checkpoints hold them. A step sees
    that the masters of a state which it returned were replaced, and sends them whole; those of a copy it cannot see:
    write step.init(params) for other parameters.

    Args:
      wire: what packs the difference, as fz.int4(2048).

    Raises:
      TypeError, ValueError: it is no wire that rounds, or has memory already.

    Source: Jia et al., SDP4Bit, arXiv 2410.15526 (there: weight differences).

    >>> from funczero import int4
    >>> print(difference(int4(2048)))
    difference(int4(2048))
    """
    _rounds(wire, "difference")
    return wire._replace(name=f"difference({wire})", difference=True)


def _rounds(wire: Wire, who: str) -> None:
    if not isinstance(wire, Wire):
        raise TypeError(f"{who}: {wire!r} is no wire; write {who}(fz.int4(512))")
    if wire is as_born:
        raise ValueError(f"{who}: as_born rounds nothing, so there is nothing to remember; leave {who} out")
    if wire.memory is not None or wire.difference:
        raise ValueError(f"{who}: {wire} has memory already; write {who} around the wire inside it")


class Held(NamedTuple):
    """A rank's memory of one edge as a sum uses it."""

    errors: Slots  # at the place of what is summed
    scale: Tensor  # 0-d: of the loss, and so of the gradients that are summed


def remembered(memory: Memory, sent: Tensor, read: Tensor, old: Tensor, scale: Tensor) -> Tensor:
    """A unit's new memory; where values are not finite the old one stays.

    Args:
      sent, read: a unit's buffer as it was to be sent, and as its readers read it, in the scale of the loss.
    """
    new = memory.keep(sent / scale, read / scale, old)
    return torch.where(new.isfinite(), new, old)


def added(leaves: Sequence[Tensor], errors: Sequence[Tensor], scale: Tensor, out: Sequence[Tensor]) -> None:
    """Leaves plus what is remembered of them, into `out`."""
    for x, e, v in zip(leaves, errors, out, strict=True):
        v.copy_(x).add_(e * scale.to(e.dtype))

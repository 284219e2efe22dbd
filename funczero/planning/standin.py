"""A loss that reads every parameter once and computes nothing: for the bytes of a chain, without a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.gradients.gradient import value_and_grad
from funczero.gradients.layers import group_of, run_block
from funczero.gradients.ref import Ref
from funczero.layout.spec import P
from funczero.transforms.chain import Source


class Read(torch.autograd.Function):
    """x, after tensors were read that all have a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *read: Tensor) -> Tensor:
        """The value of x."""
        ctx.save_for_backward(*read)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """A gradient for each that wants one."""
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return (grads[0], *(torch.empty_like(x) if wants else None for x, wants in wanted))


def standing_in(source: Source) -> Source:
    """The same Source with such a loss: units are opened one after another, in the order of their leaves."""
    if source.name != "value_and_grad":
        return source
    own = value_and_grad(_loss, P(source.batch), units=source.units, conditional=())
    return source._replace(make=own.make, cut=0, spec=None, conditional=())


def _loss(params: Any, batch: Any) -> tuple[Tensor, Tensor]:
    once = list({_name(x): x for x in tree.flatten(params)[0]}.values())
    loose = [x for x in once if not isinstance(x, Ref)]
    x = Read.apply(torch.zeros(()).requires_grad_(), *loose)
    blocks: dict[str, list[Ref]] = {}
    for ref in once:
        if isinstance(ref, Ref):
            blocks.setdefault(ref.tape.whole.structure.units[ref.unit].name, []).append(ref)
    groups = [(refs, group_of(refs)) for refs in blocks.values()]
    for (refs, group), (_, after) in zip(groups, [*groups, ([], ())][1:], strict=True):
        x = run_block(_block, tree.flatten(refs), group, (x,), {}, after, remat=False)
    return x, torch.ones(())


_loss.keyed = True  # type: ignore[attr-defined]  # it draws nothing, and nobody needs to look


def _name(x: Any) -> Any:
    return ("leaf", x.leaf) if isinstance(x, Ref) else id(x)


def _block(leaves: list[Tensor], x: Tensor) -> Tensor:
    found: Tensor = Read.apply(x, *leaves)
    return found

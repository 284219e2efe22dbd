"""Parameters at rest as a loss reads them that may be differentiated any number of times: the third form of a unit.

A tape's units are first-order, because their gradients leave while the backward runs. Here a block is a function of
this rank's parts of its leaves, with the gather inside: only parts and inputs are saved, and every derivative of the
block is the block's derivative run again (straight.py). What `torch.func` or `create_graph` asks for inside a loss, or
of it, follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funczero.comm.adjoint import vary
from funczero.comm.differentiable import outwards, over_leaves, units_of
from funczero.core import tree
from funczero.core.straight import straight
from funczero.gradients.arrivals import Group
from funczero.gradients.draws import KINDS, foreseen
from funczero.gradients.loss import written
from funczero.gradients.ref import Ref
from funczero.gradients.surroundings import Uncached, here, restored
from funczero.layout.mesh import Mesh
from funczero.layout.where import Where


class Derivable(TorchFunctionMode):
    """Attention as plain operations, for this thread: torch's fused kernels have no second derivative.

    torch's own switch of kernels (sdpa_kernel) is the process's, and two threads that take turns with it leave it off.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function; of attention what its kernels are made of."""
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """F.scaled_dot_product_attention."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the plain form adds its mask
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    found: Any = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return found[0]


class _Counted(torch.autograd.Function):
    """A leaf as it is; what comes back to it counts as zero where the loss turns out to weigh nothing."""

    @staticmethod
    def forward(x: Tensor, parts: Parts) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Parts], output: Tensor) -> None:
        ctx.parts = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        # zeros that stay in the graph: a derivative of them is taken, and sends, on every rank
        return g.masked_fill(torch.ones_like(g, dtype=torch.bool), 0.0) if ctx.parts.void else g, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        return dx.view_as(dx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, parts: Parts) -> tuple[Tensor, int | None]:
        return _counted(x, parts), in_dims[0]


_counted: Callable[[Tensor, Parts], Tensor] = _Counted.apply


class Parts:
    """This rank's parts of all leaves for one forward: whole outside the units, closed inside them until they run."""

    def __init__(
        self,
        where: Where,
        parts: Mapping[int, Tensor],
        mesh: Mesh,
        varied: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        may_be_void: bool = False,
    ) -> None:
        """where: of the parts; parts: by leaf number, in their logical shapes.

        Args:
          varied: mesh axes beyond those of `where` along which ranks have rows of their own, and the parts are one
            value for all.
          dtype: in which they travel and are read; by default their own.
          may_be_void: is it known only after the forward whether its loss counts? Then `void` says that it does not.

        Raises:
          RuntimeError: it is inference_mode, whose tensors nobody can see a write into.
        """
        if torch.is_inference_mode_enabled():
            why = "a loss of parts is called under torch.inference_mode, whose tensors have no derivative or version"
            raise RuntimeError(f"value_and_grad, sharded_loss: {why}; write torch.no_grad, or step.eval(loss_fn)")
        self.where, self.parts, self.mesh, self.varied = where, parts, mesh, tuple(varied)
        some = next(iter(parts.values()))
        self.whole = Where.whole(where.structure)
        self.dtype, self.device, self.differentiate = dtype or some.dtype, some.device, True
        self.may_be_void, self.void = may_be_void, False
        self.lent: list[tuple[int, Tensor, int]] = []  # whole leaves in a loss's hands, and their versions
        self.versions = {i: x._version for i, x in parts.items()}

    @property
    def ports(self) -> list[Tensor]:
        """What stands for the closed leaves in a graph."""
        return list(self.parts.values())

    def tree(self) -> Any:
        """The whole parameters as the tree that was given to init; a collective."""
        structure = self.where.structure
        out: list[Any] = [None] * len(structure.leaves)
        loose = [u for u, unit in enumerate(structure.units) if not unit.seam]
        for i, x in self.gathered(loose).items():
            out[i] = x
        for u, unit in enumerate(structure.units):
            for i in structure.members[u] if unit.seam else ():
                out[i] = Ref(self, i)
        return structure.unflatten(out)

    def parts_of(self, group: Sequence[int]) -> dict[int, Tensor]:
        """The parts of some units' leaves, by leaf number."""
        return {i: self.parts[i] for u in group for i in self.where.structure.members[u]}

    def opened(self, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        """Leaves whole, out of their parts; a value of this rank, whose cotangents are summed over all."""
        frozen = {i: x for i, x in parts.items() if self.where.structure.frozen(i)}
        learning = {i: x for i, x in parts.items() if i not in frozen}
        return self._joined(frozen) | self._joined(learning)  # apart: one message would make all of them learn

    def _joined(self, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        if not parts:
            return {}
        units, where = units_of(self.where, parts), self.where
        out = over_leaves(where, parts, lambda i: self.varied, self.mesh, partial(vary, units=units))
        while where.coords:  # narrow over the outermost alone: sums of gradients stay wide
            last = self.dtype if len(where.coords) == 1 else None
            out, where = outwards(where, out, self.mesh, last), where.outer
        out = {i: x.to(self.dtype) for i, x in out.items()}
        return {i: _counted(x, self) for i, x in out.items()} if self.may_be_void else out

    def run(self, group: Group, block: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """block(leaves by number, inputs) -> a tuple, with the units open inside.

        What it draws from torch's generator comes once: runs for a derivative draw the same numbers again. It sees the
        grad mode that it is called in, and keeps no graph.
        """
        found, ran, mode = here(self.device), list[bool](), torch.is_grad_enabled()

        def first(parts: dict[int, Tensor], inputs: Sequence[Tensor]) -> Any:
            ran.append(True)
            with foreseen(self.device, _drew), torch.set_grad_enabled(mode):
                outs = self._run({i: x.detach() for i, x in parts.items()}, block, [x.detach() for x in inputs])
            return tree.map(lambda y: y.detach() if isinstance(y, Tensor) else y, outs)

        def again(parts: dict[int, Tensor], inputs: Sequence[Tensor]) -> Any:
            with restored(found), foreseen(self.device, _drew, KINDS[1:] if ran else KINDS):
                return self._run(parts, block, inputs)

        return straight(first, again, self.parts_of(group), list(inputs))

    def _run(self, parts: dict[int, Tensor], block: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        leaves = self.opened(parts)
        before, given = {i: x._version for i, x in leaves.items()}, [x._version for x in inputs]
        try:
            with Uncached(), Derivable():
                outs = block(leaves, inputs)
        except RuntimeError as error:
            if "support saved tensor hooks" not in str(error):
                raise
            why = "a block uses torch.utils.checkpoint, or hooks of saved tensors, which torch.func knows nothing of"
            remedy = "leave that out: such a block saves its inputs alone"
            raise RuntimeError(f"value_and_grad(higher_order=True): {why}; {remedy}") from None
        if [x._version for x in inputs] != given:
            why = "changes an input in place, and is run again for every derivative"
            raise RuntimeError(f"value_and_grad(higher_order=True): a block {why}; write x = x + y")
        self.untouched({i: x for i, x in leaves.items() if x._version != before[i]})
        return outs

    def gathered(self, group: Sequence[int]) -> dict[int, Tensor]:
        """Leaves of some units, whole for as long as a loss holds them."""
        leaves = self.opened(self.parts_of(group))
        self.lent += [(i, x, x._version) for i, x in leaves.items()]
        return leaves

    def reopened(self, leaf: int) -> None:
        """None: no part of a block runs again by itself here."""

    def left_alone(self) -> None:
        """Refuse a loss that wrote into this rank's parts, or into what it was given whole."""
        lent, self.lent = self.lent, []
        self.untouched({i: x for i, x, version in lent if x._version != version})
        self.untouched({i: x for i, x in self.parts.items() if x._version != self.versions[i]})

    def untouched(self, odd: Mapping[int, Tensor]) -> None:
        """Refuse a loss that wrote these of its parameters, by path."""
        for i in odd:
            raise written(self.where.structure.leaves[i].path)


def _drew(kind: str) -> RuntimeError:
    why = f"draws from {kind}'s generator, and would draw other numbers for a derivative"
    remedy = "draw before the block and hand the numbers in"
    return RuntimeError(f"value_and_grad(higher_order=True): a block {why}; {remedy}")

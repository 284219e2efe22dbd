"""The graph under a loss: its leaves, the gradients at them, and losses that are too old."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.exhausted import amid, asking
from funczero.core.spans import span

OLD = (
    "backward: this loss comes from a forward before the last update, and the parameters have moved since; "
    "run engine(batch) again after engine.step()"
)


def differentiate(
    loss: Tensor,
    wanted: Sequence[Tensor],
    cotangent: Tensor,
    retain: bool,
    over: float,
    others: list[tuple[Tensor, Tensor]],
    ports: tuple[Tensor, ...] = (),
    owner: Any = None,
    where: Callable[[], str] = amid,
) -> list[Tensor | None]:
    """Gradients at `wanted`.

    Args:
      loss, cotangent: 0-d.
      others: is given the leaves of no engine with what (loss / over).backward() would add to their .grad.
      ports: leaves that stand for closed units; the gradients of those go their own way.
      owner: the `home` of leaves that were made for one window.
      where: the backward is, for an error of memory.

    Raises:
      RuntimeError: the loss is of an older window, or depends on no parameter that is trained.
    """
    known, leaves = {id(x) for x in (*wanted, *ports)}, leaves_under(loss)
    if owner is not None and any(getattr(x, "home", None) is owner and id(x) not in known for x in leaves):
        raise RuntimeError(OLD)
    if not any(id(x) in known for x in leaves):
        why = "this loss depends on no parameter of this engine that is trained"
        raise RuntimeError(f"engine.backward: {why}; compute it from what engine(batch) returns")
    beside = [x for x in leaves if id(x) not in known and not hasattr(x, "home")]
    with span("backward"), asking(where):
        found = torch.autograd.grad(loss, [*wanted, *ports, *beside], cotangent, retain_graph=retain, allow_unused=True)
    for x, g in zip(beside, found[len(known) :], strict=True):
        if g is not None:
            others.append((x, (g / (cotangent * over).to(g.dtype)).detach()))
    return list(found[: len(wanted)])


def leaves_under(loss: Tensor) -> list[Tensor]:
    """Tensors that the graph of a loss ends in."""
    todo, seen, out = [loss.grad_fn], {loss.grad_fn}, []
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            out.append(leaf)
        for n, _ in node.next_functions:  # type: ignore[union-attr]
            if n is not None and n not in seen:
                seen.add(n)
                todo.append(n)
    return out


def stamp(out: Any, window: int, clock: list[int]) -> None:
    """A backward through what a forward of an older window returned is refused."""

    def check(grads: Any) -> None:
        if clock[0] != window:
            raise RuntimeError(OLD)

    for x in tree.leaves(out):
        for t in (x,) if isinstance(x, Tensor) else tuple(getattr(x, "__dict__", {}).values()):
            if isinstance(t, Tensor) and t.grad_fn is not None:
                t.grad_fn.register_prehook(check)


def check_loss(loss: Any) -> None:
    """Refuse what engine.backward can take no gradient of."""
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        what = f"a {type(loss).__name__}"
        if isinstance(loss, Tensor):
            what = f"a tensor of shape {tuple(loss.shape)} and {loss.dtype}"
        raise TypeError(f"engine.backward: the loss is {what}; give one floating 0-d tensor, as loss.mean()")
    if not loss.requires_grad:
        why = "this loss needs no gradient; was the forward under torch.no_grad(), or the output detached?"
        raise RuntimeError(f"engine.backward: {why}")


def explained(error: RuntimeError) -> str | None:
    """torch's errors of graphs in the engine's words."""
    text = str(error)
    if "modified by an inplace operation" in text:
        return (
            "engine.backward: this loss was computed before the last update, or something in its graph was changed in "
            "place; run the forward again after engine.step()"
        )
    if "backward through the graph a second time" in text:
        return (
            "engine.backward: this graph was used up by a backward before; "
            "write engine.backward(loss, retain_graph=True) the first time, or add the losses"
        )
    return None

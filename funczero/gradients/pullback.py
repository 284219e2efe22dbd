"""A gradient whose forward ran elsewhere: a Source that is handed a vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.exhausted import amid, asking
from funczero.core.spans import span
from funczero.core.types import ChainError, Env, Grad, Seed, State
from funczero.gradients.call import Outcome
from funczero.gradients.source import gradient_of, layout_of, names_of, on_tape, patterns_of
from funczero.gradients.tape import Tape
from funczero.layout.spec import P, of_batch
from funczero.transforms.chain import Source


def pullback(
    batch: P = P(), trainable: str | Callable[[str], bool] | None = None, replicated: Sequence[str] = ()
) -> Source:
    """A gradient whose forward ran elsewhere: its batch is `(pull, loss, weight)` with `pull: cotangent -> gradients`.

    `pull` is the vector-Jacobian product of the caller's loss at `step.view(state)`, as the tree of those leaves (see
    fz.pull); scaling, brackets, clipping and optimizers do not know the difference.

    Layout out: as value_and_grad.
    """
    matches = tree.matcher(trainable)
    frozen = (lambda path: False) if trainable is None else (lambda path: not matches(path))

    def pulled(whole: list[Tensor], micro: Any, seed: Seed, state: State, tape: Tape) -> tuple[Outcome, list[Any]]:
        if not isinstance(micro, tuple) or len(micro) != 3 or not callable(micro[0]):
            raise TypeError(
                f"pullback: its batch is (pull, loss, weight), but this is a {type(micro).__name__}; write step(state,"
                " (fz.pull(loss, views), loss, weight))"
            )
        pull, loss, weight = micro
        loss, weight = (torch.as_tensor(x, device=tape.port.device).detach() for x in (loss, weight))
        structure = tape.whole.structure
        with span("backward"), asking(amid):
            flat = structure.treedef.flatten_up_to(pull(seed.cotangent.to(loss.dtype)))
        grads: list[Any] = [None] * len(structure.leaves)
        for place, g in zip(structure.places, flat, strict=True):
            if g is not None:
                grads[place] = g if grads[place] is None or g is grads[place] else grads[place] + g
        return Outcome(loss, weight, None, ()), [None if structure.frozen(i) else g for i, g in enumerate(grads)]

    patterns = patterns_of("pullback(trainable=...)", trainable)

    def make(source: Source, env: Env) -> Grad:
        if env.differentiable:
            why = "its forward ran elsewhere, where a derivative of the step does not reach"
            raise ChainError(f"pullback: {why}; write value_and_grad(loss_fn, ...) for a differentiable step")
        layout = layout_of(source, env)
        return gradient_of(source, env, layout, on_tape(source, env, layout, pulled, forward=False))

    axes, cut = of_batch(batch)
    if cut != 0:
        why = "its rows were read by a forward elsewhere, and nothing of them is dealt or cut here"
        raise ChainError(f"pullback: batch={batch}, but {why}; write the axes alone: batch={P(axes)}")
    return Source("pullback", make, axes, (), frozen, patterns=patterns, replicated=names_of(replicated))


def pull(loss: Tensor, views: Any) -> Callable[[Tensor], Any]:
    """The vector-Jacobian product of a loss at the leaves that its forward used, for `pullback`."""
    flat, treedef = tree.flatten(views)

    def vjp(cotangent: Tensor) -> Any:
        unique = {id(x): x for x in flat if isinstance(x, Tensor) and x.requires_grad}
        grads = dict(
            zip(unique, torch.autograd.grad(loss, list(unique.values()), cotangent, allow_unused=True), strict=True)
        )
        return tree.unflatten([grads.get(id(x)) for x in flat], treedef)

    return vjp

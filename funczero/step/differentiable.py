"""A whole train step as a function with derivatives: from every leaf of the state and of the batch to every leaf."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from funczero.comm import differentiable as crossing
from funczero.core import rng
from funczero.core.straight import outside
from funczero.core.types import ChainError, Grad, Metrics, Seed, TrainState, Updated
from funczero.step.fits import Fits
from funczero.step.step import Step, metrics_of, not_compiled


class DifferentiableStep(NamedTuple):
    """`state, metrics = step(state, batch)`, for torch.func. See `differentiable`."""

    grad: Callable[[], Grad]  # the chain's second interpretation, on the live mesh
    fits: Fits

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """One update of a global step, on this rank's rows."""
        if torch.compiler.is_compiling():
            not_compiled()
        self.fits.suits(state)
        g = self.grad()
        mesh, masters = g.env.mesh, state.params
        views = masters.to(g.env.policy.compute)
        for _ in masters.where.axes[len(g.layout.rest) :]:
            views = crossing.all_gather(views, views.where.axes[-1], mesh)
        run, now = rng.known(state.key), rng.known(state.step)
        key = rng.UNKNOWN if run is None or now is None else rng.fold(run, now)
        seed = Seed(torch.ones((), device=mesh.device), key)
        out, chain = g.apply(views, {**state.chain, "params": masters}, batch, seed)
        assert isinstance(out, Updated)
        new = chain.pop("params")
        wide = None if state.views is None else out.params.to(g.env.policy.compute).with_frozen(views)
        fresh = TrainState(new, wide, chain, state.step + 1, state.updates + out.ok, state.key)
        metrics = metrics_of(out, fresh)
        return fresh, metrics if metrics.aux is not None else metrics._replace(aux=())  # vmap returns tensors alone


def differentiable(step: Step) -> DifferentiableStep:
    """The step as a function that torch.func differentiates, in reverse and forward mode, and batches.

    Laws: values are the step's own, bit for bit; to rounding with units, under vmap, and where attention runs, which is
    made of plain operations here. Derivatives, from every floating leaf of the state and of the batch to every leaf of
    the new state and the metrics, are those of the unsharded update, at every stage and on any number of ranks, each
    rank having its part of them. An update that is not finite is skipped, and is the identity; in a batch of vmap or a
    traced graph, where nobody can see that it is, its reverse mode is nan. The derivative of the norm at 0, and of the
    root of a second moment at 0, is 0. Loss scales, whose effect is divided out, change nothing.

    Views apart from the masters follow from them in every call, so all that depends on the parameters is found at
    `state.params`. What the chain freezes is a constant. Draws need the state's key as a number: under vmap over states
    and in a traced graph a loss that draws is refused.

    Args:
      step: of optimizers with a formula of plain operations: adamw, adam, sgd, adagrad, lion, or a lifted pair.

    Raises:
      ChainError: the step is compiled, or the chain streams, packs what it sends (wires), begins with a pullback, or
        ends in another optimizer.

    Source: Finn et al., Model-Agnostic Meta-Learning, arXiv 1703.03400; Maclaurin et al., arXiv 1502.03492.

    >>> import funczero as fz
    >>> loss_fn = lambda p, b: (((p["w"] - b) ** 2).sum() / 2, torch.tensor(float(len(b))))
    >>> step = fz.train_step(fz.value_and_grad(loss_fn), fz.sgd(0.1))
    >>> state, batch = step.init({"w": torch.tensor(1.0)}), torch.zeros(4)
    >>> moved = lambda w: fz.parts(fz.differentiable(step)(fz.with_parts(state, {"w": w}), batch)[0])["w"]
    >>> round(torch.func.grad(moved)(torch.tensor(1.0)).item(), 6)
    0.9
    """
    if step.grad.env.capture is not None:
        why = "its values would be the eager step's, and not those of the compiled one"
        raise ChainError(f"differentiable: {why}; hand in the step that fz.compile was given")
    step.interpreted(step.grad.env._replace(donate=False, differentiable=True))  # refused here, in any process

    @cache
    def grad() -> Grad:
        with outside():
            return step.interpreted(step.running().env._replace(donate=False, differentiable=True, early=None))

    return DifferentiableStep(grad, step.fits)

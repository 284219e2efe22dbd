"""The engines of a loop: one for each optimizer, and the three moments that a loop calls: backward, step, zero_grad."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.engine import Engine
from funczero.deepspeed.engine.graphs import leaves_under
from funczero.deepspeed.engine.initialize import engine_over
from funczero.lightning.clip import AskedClip, none
from funczero.lightning.face import LoopOptimizer
from funczero.lightning.parts import parts_of
from funczero.lightning.prepare import keep
from funczero.lightning.settings import Settings
from funczero.transforms.loss_scale import ScaleLoss

Optimizers = Sequence[torch.optim.Optimizer]


class One:
    """An engine with where its loop stands between an update and the next zero_grad."""

    def __init__(self, engine: Engine) -> None:
        """engine: over one optimizer's parameters."""
        self.engine = engine
        self.spent = False  # updated, and no zero_grad since
        self.passed_by = False  # a backward came meanwhile
        self.strict = False  # the next update raises where its gradient is not finite
        self.clipped = False  # since the last backward
        if engine.optimizer is not None:  # otherwise it only evaluates
            engine.optimizer = LoopOptimizer(engine, self.forget)
            refuse_step(engine.optimizer.client)

    def forget(self) -> None:
        """The window is empty, and the next backward counts."""
        if self.clipped:
            self.engine.keep(none())
        self.engine.forget()
        self.spent = self.passed_by = self.clipped = False

    def backward(self, loss: Tensor, retain_graph: bool) -> None:
        """The gradient of a loss into the window.

        Raises:
          RuntimeError: the window is to be clipped already.
        """
        if self.clipped:
            why = "in torch this gradient would be added to a clipped one, and here the sum would be clipped"
            raise RuntimeError(f"backward: it comes after clip_gradients, and {why}; clip right before step()")
        self.engine.backward(loss, retain_graph=retain_graph)

    def learns(self) -> bool:
        """Has the optimizer a parameter that wants a gradient now? toggle_optimizer switches them off."""
        return any(p.requires_grad for g in self.engine.optimizer.param_groups for p in g["params"])

    def clip(self, norm: float | None = None, value: float | None = None) -> None:
        """The next update clips its mean gradient, by norm or by value; ranks compare what they ask for.

        Raises:
          RuntimeError: both are asked for.
        """
        e = self.engine
        if not e.window_is_open(writes=False):
            return  # torch clips no gradient, too
        own = e.train_step.state_of(e.state, AskedClip)
        assert own is not None
        asked = none()
        for field, x in (("norm", norm), ("value", value)):
            if x is not None:
                asked = asked._replace(**{field: torch.tensor(float(x), dtype=torch.float64)})
        before = [float(x) for x in own]
        if before != [float("inf")] * 2 and before != [float(x) for x in asked]:
            why = "one update is clipped once, and it has been asked for another limit already"
            raise RuntimeError(f"clip_gradients: {why}; call it once before step()")
        ledger = e.live_mesh.ledger
        call = f"clip_gradients(norm={norm}, value={value})"
        e.together(call, lambda: ledger.note("clip", f"{norm} {value}"))
        e.keep(asked)
        self.clipped = True

    def step(self) -> None:
        """The update from what backwards have added since the last; nothing where there was none, as in torch.

        Raises:
          RuntimeError: gradients of before the last update would count once more in torch.
        """
        e = self.engine
        if self.passed_by:
            raise RuntimeError(
                "optimizer.step: a backward came after the last step() and before zero_grad(), so that in plain torch"
                " the gradient that was used up would count again; call zero_grad() after every step()"
            )
        if not e.window_is_open(writes=False):
            name = e.stray_gradient()
            if name is not None:
                raise RuntimeError(
                    f"optimizer.step: parameter {name!r} has a .grad, so loss.backward() was called directly and"
                    " nothing here has heard of it; write self.manual_backward(loss), or fabric.backward(loss)"
                )
            return
        e.step()  # where it fails, what was asked of it is still asked
        strict, self.strict, self.clipped, self.spent = self.strict, False, False, True
        if not e.was_step_applied() and e.train_step.state_of(e.state, ScaleLoss) is None:
            if strict:
                why = "the total norm of the gradients is not finite, so nothing was updated"
                raise RuntimeError(f"optimizer.step: {why}; write error_if_nonfinite=False to go on")
            if e.global_rank == 0:
                warnings.warn(
                    f"update {e.global_steps} was skipped, because its gradient is not finite; plain torch would have"
                    " written it into the weights",
                    RuntimeWarning,
                    stacklevel=2,
                )


def refuse_step(client: Any) -> None:
    """The user's own optimizer, whose groups the engine reads, can no longer be stepped: it would find no gradient."""

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{type(self).__name__}.step: a strategy has taken this optimizer over, so it would find no gradient and do"
            " nothing; step self.optimizers(), or the optimizer that fabric.setup returned"
        )

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # what torch's schedulers look for
    client.step = MethodType(step, client)


class Engines:
    """All engines of a loop."""

    def __init__(self, settings: Settings) -> None:
        """settings: of the strategy."""
        self.settings = settings
        self.each: list[One] = []
        self.roots: list[nn.Module] = []

    def add(self, root: nn.Module, optimizers: Optimizers) -> list[LoopOptimizer]:
        """Engines over a module's parts that these optimizers have, or one that only evaluates.

        The module is on the device already, with one value on all ranks.
        """
        s, config = self.settings, self.settings.config()
        if not optimizers:
            parts, new = [root], [One(engine_over(root, config))]
        else:
            parts = parts_of(root, optimizers, s.stage)
            new = [One(engine_over(p, config, o, s.between())) for p, o in zip(parts, optimizers, strict=True)]
        self.each += new
        self.roots += parts
        keep(root, [one.engine for one in new])
        return [one.engine.optimizer for one in new if one.engine.optimizer is not None]

    def of(self, optimizer: Any) -> One:
        """The one of an optimizer that `add` returned, wrapped or not.

        Raises:
          ValueError: it is somebody else's.
        """
        inner = getattr(optimizer, "_optimizer", optimizer)
        found = next((x for x in self.each if x.engine.optimizer is inner), None)
        if found is None:
            raise ValueError(
                f"optimizer: this {type(inner).__name__} was not set up with the strategy, so it would update nothing"
                " that is trained; return it from configure_optimizers, or hand it to fabric.setup"
            )
        return found

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Adds the gradient of a loss to every engine's window that it reaches.

        Raises:
          RuntimeError: it reaches none.
        """
        reached = [x for x in self.each if x.engine.optimizer is not None and x.learns() and x.engine.reached_by(loss)]
        if not reached:
            raise RuntimeError(
                "backward: this loss depends on no parameter that an optimizer of this strategy trains; compute it from"
                " what the module returns, and check requires_grad (toggle_optimizer)"
            )
        for x in reached:
            x.passed_by = x.passed_by or x.spent
        counting = [x for x in reached if not x.spent]
        if not counting:
            return
        others = _others(loss) if len(counting) > 1 else []
        for i, x in enumerate(counting):
            kept = [y.grad for y in others] if i else []
            x.backward(loss, retain_graph or i + 1 < len(counting))
            for y, g in zip(others if i else (), kept, strict=True):
                y.grad = g

    def inside(self, root: nn.Module, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """fn(*args, **kwargs), which reads parameters of this module itself; at stage 3 all ranks call it alike."""
        one = next((x for x, r in zip(self.each, self.roots, strict=True) if r is root), None)
        return fn(*args, **kwargs) if one is None else one.engine.inside(fn, *args, **kwargs)

    def hold(self, module: nn.Module) -> bool:
        """Has one of them a parameter of this module?"""
        own = {id(p) for r in self.roots for p in r.parameters()}
        return any(id(p) in own for p in module.parameters())


def _others(loss: Tensor) -> list[Tensor]:
    """Leaves of no engine, whose .grad a backward adds to."""
    return [x for x in leaves_under(loss) if not hasattr(x, "home")]


def broadcast_buffers(modules: Iterable[nn.Module]) -> None:
    """Rank 0's buffers on all ranks, as DistributedDataParallel does before a forward. A collective."""
    if ranks.get_world_size() > 1:
        for b in (b for m in modules for b in m.buffers()):
            torch.distributed.broadcast(b.data, 0)

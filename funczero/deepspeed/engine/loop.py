"""An engine's training loop: forward, backward and step are three moments of `step(state, micro_batch)`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.exhausted import asking
from funczero.core.types import Metrics, TrainState
from funczero.deepspeed.config.optimizers import GroupRates
from funczero.deepspeed.config.resolved import Config
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.breakdown import Breakdown
from funczero.deepspeed.engine.flops import Flops, Sizes, elements
from funczero.deepspeed.engine.graphs import check_loss, explained, stamp
from funczero.deepspeed.engine.holder import Holder
from funczero.deepspeed.engine.log import logger
from funczero.deepspeed.engine.monitor import Monitor
from funczero.deepspeed.engine.standing import Standing
from funczero.deepspeed.engine.throughput import Throughput
from funczero.deepspeed.engine.window import amended, emptied, filled, multiplied, taken
from funczero.deepspeed.optim.optimizer import DIRECT
from funczero.step.calls import holding
from funczero.step.step import Step
from funczero.world.entries import FORWARD


class Loop(Standing):
    """Where a loop over an engine's state stands in the window of micro-batches."""

    def __init__(
        self,
        holder: Holder,
        config: Config,
        step: Step,
        state: TrainState,
        rates: Sequence[GroupRates] = (),
        made: Callable[[Config], Step] | None = None,
    ) -> None:
        """Use initialize.

        Args:
          holder: how a forward reads the module's parameters.
          rates: the config's schedule by group.
          made: the step of a config with another batch.
        """
        super().__init__(holder, step, state)
        self.config_, self._k, self._rates, self._made = config, config.triad.steps, rates, made
        self._managed, self._cast = config.value("managed_gradient_accumulation"), config.value("fp16.auto_cast")
        self._boundary: bool | None = None
        self._backwards = self._micro = 0  # backwards since the last step(), step() calls in the window
        self._again = False  # the next backward adds to the micro-batch of the last one
        self._unsent = False  # inside no_sync
        self._waits = False  # the last step() failed before it wrote, and its window is as it was
        self.micro_steps = self.global_samples = 0
        self.metrics: Metrics | None = None
        self._updated = False
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        self.client_lr_scheduler = False
        self.tput_timer, self.monitor = Throughput(), Monitor(config)
        self._breakdown = Breakdown(config, self.monitor, lambda: self.live_mesh.sent)
        self.device, self.mp_world_size = step.live_mesh.device, 1
        self._flops = Flops(config, ranks.get_rank())
        self.global_rank, self.local_rank = ranks.get_rank(), ranks.get_local_rank()
        self.world_size = self.dp_world_size = ranks.get_world_size()
        self._holder.renew(self._step, state)

    # --- the three moments
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, unscaled. Under torch.no_grad() it has no side effect on the window."""
        self.check_whole("engine(...)")
        if self._cast:
            half = lambda x: x.half() if isinstance(x, Tensor) and x.is_floating_point() else x
            args, kwargs = tree.map(half, (args, kwargs))
        with self._asking(FORWARD):
            if not torch.is_grad_enabled():
                return self._holder.forward(*args, **kwargs)
            with self._breakdown.of("fwd"), self._flops.of("fwd", lambda: self.global_steps):
                out = self._holder.forward(*args, **kwargs)
        stamp(out, self._clock[0], self._clock)
        return out

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Takes the gradient of a loss into the window; returns loss / gradient_accumulation_steps.

        Args:
          loss: 0-d, the mean over this rank's micro-batch, computed from what the engine returned. Criteria may be
            outside of the module.
          scale_wrt_gas: False: this loss is added to the window undivided.
        """
        self._check_trains("backward")
        self.check_whole("engine.backward")
        if self._waits:
            waits = "the last engine.step() failed before it wrote anything, and this gradient would join its own"
            remedy = (
                "call engine.step() again, or engine.forget() (zero_grad() under Lightning) to go on without those"
                " micro-batches"
            )
            raise RuntimeError(f"engine.backward: {waits}; {remedy}")
        check_loss(loss)
        over = self._k if scale_wrt_gas else 1
        more = self._again or self.window_length() >= self._k
        times = self._k // over  # a loss that is not averaged weighs as much as k of those that are
        others: list[tuple[Tensor, Tensor]] = []  # leaves of no engine
        pull = multiplied(self._holder.pull(loss, retain_graph, over, others), times)
        micro = (pull, loss if times == 1 else loss.detach() * times, 0.0 if more else 1.0)
        try:
            with (
                self._asking("engine.backward"),
                self._breakdown.of("bwd"),
                self._flops.of("bwd", lambda: self.global_steps),
            ):
                state = amended(self._step, self._state, micro) if more else self._step(self._state, micro)[0]
                beside = [(x, g if x.grad is None else x.grad + g) for x, g in others]
        except RuntimeError as e:
            why = explained(e)
            if why is None:
                raise
            raise RuntimeError(why) from e
        self._state, self._backwards, self._again = state, self._backwards + 1, True  # all of it, or nothing
        for x, g in beside:
            x.grad = g
        return loss.detach() / over if over > 1 else loss.detach()

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """The end of a micro-batch; at the boundary the update.

        Where it fails before it has written, as for a schedule that raises, everything is as it was and it may be
        called again. Where it fails later, the engine says so until a checkpoint is loaded.

        Args:
          lr_kwargs: for the step() of a client's scheduler.
        """
        self._check_trains("step")
        self.check_whole("engine.step")
        if not self._backwards:
            name = self.stray_gradient()
            if name is not None:
                raise RuntimeError(DIRECT.format(who="engine.step", name=name))
            why = "engine.backward(loss) was not called since the last engine.step()"
            raise RuntimeError(f"engine.step: {why}; call it for every micro-batch, before step")
        if self._unsent:
            why = "it is called inside engine.no_sync(), where nothing is reduced; leave the context first"
            raise RuntimeError(f"engine.step: {why}")
        last = self.is_gradient_accumulation_boundary()
        self._updated = False
        if last:
            with self._asking("engine.step"), self._breakdown.of("step"):
                self._update()
                self._scheduled(lr_kwargs or {})
            self._reported()
        else:
            self._ended(last)
        if last and self._flops.counted:
            self._flops.updated(self.module, self._sizes(), self._breakdown.last)
        if self._breakdown.on:
            self._breakdown.stepped(last, self.global_samples, self.global_steps)

    def _asking(self, call: str) -> contextlib.AbstractContextManager[None]:
        """Who asks for memory inside a call and finds none is told."""
        return asking(lambda: f"in {call}, beside what its step computes", lambda: holding(call, self._state))

    def _sizes(self) -> Sizes:
        """What the flops profiler is told of this engine."""
        held = sum(x.numel() for x in tree.tensors(self._state.views or self._state.params))
        whole = {id(p): elements(p) for p in self._holder.named.values()}
        return Sizes(self.world_size, self.config_.triad.micro, self._k, held, sum(whole.values()))

    def _check_trains(self, call: str) -> None:
        if self.optimizer is None:
            why = "neither the config nor the call of initialize names an optimizer, so this engine only evaluates"
            raise RuntimeError(f'engine.{call}: {why}; add "optimizer": {{"type": "Adam"}} to the config')

    def _ended(self, last: bool) -> None:
        """A micro-batch has ended, and with the last one its window."""
        self.micro_steps, self._micro = self.micro_steps + 1, 0 if last else self._micro + 1
        self._backwards, self._again, self._waits = 0, False, False

    def _update(self) -> None:
        """All of an update but a client's scheduler, until which the engine counts as left amid it."""
        old = self._state
        try:
            self._check_written()
            self._left = "engine.step"
            new, metrics = self._step(self.optimizer.push(filled(self._step, old, self._k)), None)
        except BaseException:
            if int(old.step) >= 0:  # nothing is written
                self._left, self._waits = "", True
            raise
        self.state, self.metrics = new, metrics
        assert metrics is not None
        self._ended(last=True)
        self._updated = bool(metrics.ok)
        self.global_samples += self.config_.triad.batch
        self.tput_timer.updated(self.config_.triad.batch)
        self.optimizer.stepped()

    def _check_written(self) -> None:
        name = self._holder.written()
        if name is not None:
            what = "was written to since the last update, but the master did not hear of it"
            remedy = "write inside deepspeed.zero.GatheredParameters(params, modifier_rank=0)"
            raise RuntimeError(f"engine.step: parameter {name!r} {what}; {remedy}")

    def _scheduled(self, lr_kwargs: dict[str, Any]) -> None:
        """The end of an update: a client's scheduler moves. What it raises by itself is its own matter."""
        if not (self._updated and self.client_lr_scheduler):
            self._left = ""
            return
        try:
            self._left = ""
            self.lr_scheduler.step(**lr_kwargs)
        except Exception:
            raise
        except BaseException:  # an interrupt, anywhere in it
            self._left = "engine.step"
            raise

    def _reported(self) -> None:
        """What is written and printed of an update."""
        m = self.metrics
        assert m is not None
        if self.monitor.writers:
            scale = self.optimizer.cur_scale if self.config_.value("fp16.enabled") else None
            self.monitor.updated(self.global_samples, m.loss, self.optimizer.param_groups[0]["lr"], scale)
        every, number = self.config_.value("steps_per_print"), int(self._state.step)
        if every and number % every == 0 and self.global_rank == 0:
            lr = [g["lr"] for g in self.optimizer.param_groups]
            logger.info("step %d: loss %.6g, grad norm %.4g, scale %g, lr %s", number, m.loss, m.grad_norm, m.scale, lr)

    def window_length(self) -> int:
        """Micro-batches that the open window holds."""
        return taken(self._step, self._state)

    def window_is_open(self, writes: bool) -> bool:
        """Do parameters stand still now? From a backward to its step(), and for who writes until the update."""
        return self._backwards > 0 or writes and self.window_length() > 0

    def forget(self) -> None:
        """The open window is empty again: its gradients are not used. Nothing is sent, and all ranks call it alike."""
        if self.window_length():
            self._state = emptied(self._step, self._state)
        self._micro = self._backwards = 0
        self._again = self._waits = False

    # --- boundaries
    def is_gradient_accumulation_boundary(self) -> bool:
        """Does the next step() update?"""
        if self._boundary is not None:
            return self._boundary
        return not self._managed or self._micro + 1 >= self._k

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Whether step() updates, until it is set again. After a backward it begins another micro-batch."""
        self._boundary, self._again = bool(is_boundary), False

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing at stages 0 and 1, which send once a window anyway; refused where gradients are sharded."""
        stage = self.config_.value("zero_optimization.stage")
        if stage > 1:
            why = f"at stage {stage} gradients are sharded as they are born; leave it out, or write stage 1"
            raise RuntimeError(f"engine.no_sync: {why}")
        if self._unsent:
            raise RuntimeError("engine.no_sync: it is open already; leave the inner one out")
        self._unsent = True
        try:
            yield
        finally:
            self._unsent = False

    @contextlib.contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Nothing: backwards add up, and what can wait for the boundary is sent there anyway."""
        yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a gradient is used once."""

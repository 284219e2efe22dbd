"""DeepSpeed's engine as a thin face of one streamed chain: forward, backward and step are three moments of `step(state, micro_batch)`."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from absl import logging
from torch import Tensor, nn

from funczero.core import tree
from funczero.core.types import Metrics, TrainState
from funczero.deepspeed.config.build import Rates
from funczero.deepspeed.config.resolve import Config
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.checkpoints import Saving
from funczero.deepspeed.engine.facts import Facts
from funczero.deepspeed.engine.held import stamp
from funczero.deepspeed.engine.window import amended, filled, multiplied, taken
from funczero.deepspeed.optim.optimizer import DIRECT, EngineOptimizer
from funczero.layout.mesh import Mesh
from funczero.step.step import Step, donate

INSTEAD = {
    "scale": "engine.backward(loss) scales by itself",
    "compile": "compile blocks of the module before initialize",
    "offload_states": "offload does not exist here yet",
    "reload_states": "offload does not exist here yet",
    "monitor": "read engine.metrics",
    "timers": "read engine.metrics",
    "flops_profiler": "use torch.profiler",
    "allreduce_gradients": "engine.step() reduces",
    **dict.fromkeys(("set_train_batch_size", "set_train_micro_batch_size"), "the batch is the config's; initialize with another one and load the checkpoint"),
    "get_sequence_parallel_group": "there is no sequence parallelism here",
    "checkpoint_engine": "call engine.save_checkpoint",
    "set_data_post_process_func": "process the batch in your loop",
}


class Engine(Facts, Saving, nn.Module):
    """A module under a chain: `loss = engine(batch); engine.backward(loss); engine.step()`.

    Law: the weights, scale and schedule are bit for bit those of `engine.train_step`, the step of `fz.from_deepspeed(config, pullback=True)`,
    on the same micro-batches; `engine.state` is its state.

    A window's gradient is the sum of its losses over gradient_accumulation_steps, whatever calls of backward and step made it: the first
    losses weigh one micro-batch each, further ones are added to them, and at the boundary a short window is filled up with the weight it lacks.
    A micro-batch ends at step(), or where the boundary is set anew after a backward, as Accelerate's loops do.

    Source: DeepSpeed 0.19.8, DeepSpeedEngine.
    """

    def __init__(self, module: nn.Module, leaves: Any, config: Config, step: Step, state: TrainState, rates: Sequence[Rates] = ()) -> None:
        """Use initialize.

        Args:
          leaves: how a forward reads parameters: held.Whole or sharded.Sharded.
          rates: the config's schedule by group.
        """
        super().__init__()
        self.module = module
        self._leaves, self.config_, self.train_step, self._state = leaves, config, step, state
        self._step, self._k = donate(step), config.triad.steps
        self._managed, self._cast = config.value("managed_gradient_accumulation"), config.value("fp16.auto_cast")
        self._boundary: bool | None = None
        self._clock = [0]  # windows closed: what a graph was built in
        self._backwards = self._micro = 0  # backwards since the last step(), step() calls in the window
        self._again = False  # the next backward adds to the micro-batch of the last one
        self._unsent = False  # inside no_sync
        self.micro_steps = self.global_samples = 0
        self.metrics: Metrics | None = None
        self._updated = False
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        self.client_lr_scheduler = False
        self._rates, self._checkpointers = rates, dict[str, Any]()
        world = step.running().env.mesh
        self.device, self.mp_world_size = world.device, 1
        self.global_rank, self.local_rank = ranks.get_rank(), ranks.get_local_rank()
        self.world_size = self.dp_world_size = ranks.get_world_size()
        self._leaves.renew(step, state)

    # --- the three moments
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, unscaled. Under torch.no_grad() it has no side effect on the window."""
        if self._cast:
            args, kwargs = tree.map(lambda x: x.half() if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs))
        out = self._leaves.forward(*args, **kwargs)
        if torch.is_grad_enabled():
            stamp(out, self._clock[0], self._clock)
        return out

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Takes the gradient of a loss into the window; returns loss / gradient_accumulation_steps.

        Args:
          loss: 0-d, the mean over this rank's micro-batch; computed from what the engine returned, with criteria outside as you like.
          scale_wrt_gas: False: this loss is added to the window undivided.
        """
        self._check_loss(loss)
        over = self._k if scale_wrt_gas else 1
        more = self._again or taken(self._state) >= self._k
        times = self._k // over  # a loss that is not averaged weighs as much as k of those that are
        micro = (multiplied(self._leaves.pull(loss, retain_graph, over), times), loss if times == 1 else loss.detach() * times, 0.0 if more else 1.0)
        try:
            if more:
                self._state = amended(self._step, self._state, micro)
            else:
                self._state, _ = self._step(self._state, micro)
        except RuntimeError as e:
            said = _explained(e)
            if said is None:
                raise
            raise RuntimeError(said) from e
        self._backwards += 1
        self._again = True
        return loss.detach() / over if over > 1 else loss.detach()

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """The end of a micro-batch; at the boundary the update.

        Args:
          lr_kwargs: for the step() of a client's scheduler.
        """
        if not self._backwards:
            name = self._leaves.direct()
            why = "engine.backward(loss) was not called since the last engine.step()"
            raise RuntimeError(DIRECT.format(who="engine.step", name=name) if name else f"engine.step: {why}; call it for every micro-batch, before step")
        if self._unsent:
            raise RuntimeError("engine.step: it is called inside engine.no_sync(), where nothing is reduced; leave the context first")
        last = self.is_gradient_accumulation_boundary()
        self.micro_steps, self._micro, self._backwards, self._updated, self._again = self.micro_steps + 1, self._micro + 1, 0, False, False
        if last:
            self._update(lr_kwargs or {})

    def _update(self, lr_kwargs: dict[str, Any]) -> None:
        name = self._leaves.edited()
        if name is not None:
            what = "was written to since the last update, but the master did not hear of it"
            raise RuntimeError(f"engine.step: parameter {name!r} {what}; write inside deepspeed.zero.GatheredParameters(params, modifier_rank=0)")
        self.state, self.metrics = self._step(self.optimizer.push(filled(self._state, self._k)), None)
        self._micro, self._updated = 0, bool(self.metrics.ok)  # type: ignore[union-attr]
        self.global_samples += self.config_.triad.batch
        self.optimizer.stepped()
        if self._updated and self.client_lr_scheduler:
            self.lr_scheduler.step(**lr_kwargs)
        every = self.config_.value("steps_per_print")
        if every and self.global_steps % every == 0 and self.global_rank == 0:
            m = self.metrics
            logging.info("step %d: loss %.6g, grad norm %.4g, scale %g, lr %s", self.global_steps, m.loss, m.grad_norm, m.scale, self.get_lr())  # type: ignore[union-attr]

    @property
    def live_mesh(self) -> Mesh:
        """The mesh with its process groups."""
        return self._step.running().env.mesh

    @property
    def state(self) -> TrainState:
        """The chain's state with the optimizer's groups as they show now: `engine.train_step(engine.state, ...)` goes on without the engine."""
        return self._state if self.optimizer is None else self.optimizer.push(self._state)

    @state.setter
    def state(self, state: TrainState) -> None:
        """Parameters and the optimizer's face follow."""
        self._state = state = self._step.fits.settled(state)
        self._clock[0] += 1
        self._leaves.renew(self._step, state)
        if self.optimizer is not None:
            self.optimizer.pull(state)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's, under "module."; at stage 3 they have shapes and no values."""
        return self.module.named_parameters(f"{prefix}.module" if prefix else "module", recurse, remove_duplicate)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The module's, under "module."."""
        return self.module.named_buffers(f"{prefix}.module" if prefix else "module", recurse, remove_duplicate)

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
        if self.zero_optimization_stage() > 1:
            raise RuntimeError(f"engine.no_sync: at stage {self.zero_optimization_stage()} gradients are sharded as they are born; leave it out, or write stage 1")
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

    # --- what it knows
    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            what = f"a tensor of shape {tuple(loss.shape)} and {loss.dtype}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"engine.backward: the loss is {what}; give one floating 0-d tensor, as loss.mean()")
        if not loss.requires_grad:
            raise RuntimeError("engine.backward: this loss needs no gradient; was the forward under torch.no_grad(), or the output detached?")

    @property
    def global_steps(self) -> int:
        """Windows closed, skipped updates included."""
        return int(self._state.step)

    @property
    def skipped_steps(self) -> int:
        """Of these, the updates that were skipped."""
        return int(self._state.step) - int(self._state.updates)

    def was_step_applied(self) -> bool:
        """Did the last step() apply an update?"""
        return self._updated

    def get_global_grad_norm(self) -> float | None:
        """Of the last update's mean gradient, before the clip; inf when it was skipped for an overflow."""
        return None if self.metrics is None else float(self.metrics.grad_norm)

    def get_lr(self) -> list[float]:
        """By group."""
        return [g["lr"] for g in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """By group: betas, or momentum."""
        return [g.get("betas", g.get("momentum")) for g in self.optimizer.param_groups]

    def _set_scale(self, scale: float) -> None:
        own = self._state.chain.get("scale_loss")
        if own is None or taken(self._state):
            raise RuntimeError("override_loss_scale: the scale stands still within a window, and only fp16 has one; call it right after an update")
        self._state = self._state._replace(chain={**self._state.chain, "scale_loss": own._replace(scale=torch.full_like(own.scale, scale))})

    @property
    def basic_optimizer(self) -> EngineOptimizer:
        """The optimizer's face; the moments are in engine.state."""
        return self.optimizer

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:  # a plain attribute: a module's own way takes ten times as long
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        if name != "module" and not name.startswith("_") and name not in INSTEAD and hasattr(self.module, name):
            found = getattr(self.module, name)
            return partial(self._leaves.inside, found) if getattr(found, "__self__", None) is self.module else found
        near = get_close_matches(name, [n for n in dir(type(self)) if not n.startswith("_")], 1, 0.6)
        remedy = INSTEAD.get(name) or (f"write {near[0]!r}" if near else "engine.module, engine.state and engine.train_step show everything there is")
        raise AttributeError(f"engine.{name}: it does not exist here; {remedy}")


def _explained(error: RuntimeError) -> str | None:
    """torch's errors of graphs in the engine's words."""
    text = str(error)
    if "modified by an inplace operation" in text:
        return "engine.backward: this loss was computed before the last update, or something in its graph was changed in place; run the forward again after engine.step()"
    if "backward through the graph a second time" in text:
        return "engine.backward: this graph was used up by a backward before; write engine.backward(loss, retain_graph=True) the first time, or add the losses"
    return None

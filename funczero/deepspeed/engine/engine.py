"""DeepSpeed's engine as a thin face of one streamed chain."""

from __future__ import annotations

from difflib import get_close_matches
from functools import partial
from typing import Any

import torch

from funczero.deepspeed.engine.checkpoints import Checkpoints
from funczero.deepspeed.optim.optimizer import EngineOptimizer
from funczero.transforms.loss_scale import ScaleLoss

INSTEAD = {
    "scale": "engine.backward(loss) scales by itself",
    "compile": "compile blocks of the module before initialize",
    "offload_states": "offload does not exist here yet",
    "reload_states": "offload does not exist here yet",
    "timers": "read engine.metrics",
    "flops_profiler": "use torch.profiler",
    "allreduce_gradients": "engine.step() reduces",
    "get_sequence_parallel_group": "there is no sequence parallelism here",
    "checkpoint_engine": "call engine.save_checkpoint",
    "set_data_post_process_func": "process the batch in your loop",
}


class Engine(Checkpoints):
    """A module under a chain: `loss = engine(batch); engine.backward(loss); engine.step()`.

    Law: the weights, scale and schedule are bit for bit those of `engine.train_step`, the step of
    `fz.from_deepspeed(config, pullback=True)`, on the same micro-batches; `engine.state` is its state.

    A window's gradient is the sum of its losses over gradient_accumulation_steps, whatever calls of backward and step
    made it. The first losses weigh one micro-batch each, further ones are added to them, and at the boundary a short
    window is filled up with the weight it lacks. A micro-batch ends at step(), or where the boundary is set anew after
    a backward, as Accelerate's loops do.

    Source: DeepSpeed 0.19.8, DeepSpeedEngine.
    """

    @property
    def basic_optimizer(self) -> EngineOptimizer:
        """The optimizer's face; the moments are in engine.state."""
        return self.optimizer

    def set_loss_scale(self, scale: float) -> None:
        """Another loss scale from the next window on.

        Raises:
          RuntimeError: a window is open, or the chain scales no loss.
        """
        own = self.train_step.state_of(self._state, ScaleLoss)
        if own is None or self.window_length():
            why = "the scale stands still within a window, and only fp16 has one; call it right after an update"
            raise RuntimeError(f"override_loss_scale: {why}")
        self.keep(own._replace(scale=torch.full_like(own.scale, scale)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        if name != "module" and not name.startswith("_") and name not in INSTEAD and hasattr(self.module, name):
            found = getattr(self.module, name)
            return partial(self._holder.inside, found) if getattr(found, "__self__", None) is self.module else found
        near = get_close_matches(name, [n for n in dir(type(self)) if not n.startswith("_")], 1, 0.6)
        everything = "engine.module, engine.state and engine.train_step show everything there is"
        remedy = INSTEAD.get(name) or (f"write {near[0]!r}" if near else everything)
        raise AttributeError(f"engine.{name}: it does not exist here; {remedy}")

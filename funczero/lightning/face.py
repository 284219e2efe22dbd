"""The optimizer that a loop holds: the groups are those of the user's own, the state is the engine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from funczero.deepspeed.engine.engine import Engine
from funczero.deepspeed.optim.optimizer import EngineOptimizer
from funczero.lightning.moments import optimizer_state, restore_optimizer


class LoopOptimizer(EngineOptimizer):
    """torch's protocol over an engine: backward adds into the open window, step uses it up, zero_grad empties it.

    Law: the values of the user's optimizer on plain torch, where every update is followed by a zero_grad before the
    next backward that counts.
    """

    def __init__(self, engine: Engine, kept: Callable[[], None]) -> None:
        """kept: called at zero_grad, when gradients of earlier backwards are let go."""
        face = engine.optimizer
        super().__init__(engine, [{**g} for g in face.param_groups], face.client)
        self.let_go = kept

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The gradients since the last update are not used."""
        self.let_go()

    def step(self, closure: Any = None) -> Any:
        """Refused: the loop steps.

        Raises:
          RuntimeError: always.
        """
        raise RuntimeError(
            "optimizer.step: this is the optimizer inside Lightning's own, which must not be stepped by itself; write"
            " self.optimizers().step(), or the optimizer that fabric.setup returned"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: the state's form is fixed.

        Raises:
          RuntimeError: later.
        """
        if hasattr(self, "_engine"):
            raise RuntimeError(
                "optimizer.add_param_group: the groups are fixed once the strategy is set up, so callbacks that"
                " unfreeze later (BaseFinetuning) cannot work; give all groups in configure_optimizers, with lr 0 for a"
                " start"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's own optimizer would save it, whole, on rank 0; nothing elsewhere. A collective."""
        return optimizer_state(self.engine)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Of this class or of torch's own optimizer, whole, from any world and stage; all ranks give the same."""
        restore_optimizer(self.engine, state_dict)

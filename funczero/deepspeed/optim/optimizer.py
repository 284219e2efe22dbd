"""The returned optimizer: a `torch.optim.Optimizer` to look at and to edit, over the groups of the engine's state."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.core.types import TrainState
from funczero.deepspeed.optim.groups import KEY, Numbers, leaves, numbers

DIRECT = (
    "{who}: parameter {name!r} has a .grad, so loss.backward() was called directly and the engine has not heard of it; "
    "write engine.backward(loss) instead"
)


class EngineOptimizer(torch.optim.Optimizer):
    """Param groups whose numbers are the state's: an edit counts from the next update until the schedule's next write.

    `step` and `zero_grad` do nothing, because `engine.step()` updates and a gradient is a value that is used once.
    """

    def __init__(
        self,
        engine: Any,
        groups: list[dict[str, Any]],
        client: torch.optim.Optimizer | None = None,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        """Use initialize.

        Args:
          groups: with their parameters; a client's optimizer shares them, so that its schedulers write here.
          fixed: what every group shows beside its numbers, and what no edit can change.
        """
        self.fixed = dict(fixed or {})
        groups = [{**self.fixed, **g} for g in groups]
        super().__init__([{**g} for g in groups], dict(groups[0], params=None) if client is None else client.defaults)
        self._engine = weakref.ref(engine)
        self.client = client
        if client is not None:
            self.param_groups = client.param_groups
        for g in self.param_groups:
            g.setdefault("initial_lr", float(g["lr"]))

    @property
    def engine(self) -> Any:
        """The engine."""
        return self._engine()

    def push(self, state: TrainState) -> TrainState:
        """The state with the numbers that the groups show now."""
        own = state.chain[KEY]
        for name, value in self.fixed.items():
            if any(_number(g[name]) != _number(value) for g in self.param_groups):
                why = "it is the same for all groups and stands still; write it into the config"
                raise ValueError(f"param_groups: {name!r} was changed from {value!r}, but {why}")
        names = [n for n in own if n != "updates"]
        shown = [{n: _number(g[n]) for n in names} for g in self.param_groups]
        if shown == numbers(own):
            return state
        return state._replace(chain={**state.chain, KEY: {**own, **leaves(shown)}})

    def pull(self, state: TrainState, names: Sequence[str] = ()) -> None:
        """Show the state's numbers."""
        for g, now in zip(self.param_groups, numbers(state.chain[KEY]), strict=True):
            for n, x in now.items():
                if (not names or n in names) and _number(g.get(n)) != x:
                    if isinstance(g.get(n), Tensor):  # of a client, who keeps it
                        g[n].fill_(x)
                    else:
                        g[n] = x

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: engine.step() updates."""
        if closure is not None:
            raise TypeError(
                "optimizer.step: a closure would run the forward again, but engine.step() updates from what "
                "engine.backward(loss) was given; leave it out"
            )
        name = self.engine.stray_gradient()
        if name is not None:
            raise RuntimeError(DIRECT.format(who="optimizer.step", name=name))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a gradient is used once."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: the state's form is fixed."""
        if hasattr(self, "_engine"):
            raise RuntimeError(
                "optimizer.add_param_group: the groups of an engine are fixed; "
                "name them all in model_parameters=[{'params': ...}, ...] of initialize"
            )
        super().add_param_group(param_group)

    def stepped(self) -> None:
        """What torch's schedulers look for before they move."""
        for o in (self, self.client):
            if o is not None:
                o._opt_called = True  # type: ignore[attr-defined]

    @property
    def cur_scale(self) -> float:
        """The loss scale of the next micro-batch; 1 without fp16."""
        own = self.engine.state.chain.get("scale_loss")
        return 1.0 if own is None else float(own.scale)

    loss_scale = cur_scale

    def get_loss_scale(self) -> float:
        """cur_scale."""
        return self.cur_scale

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The client's optimizer, whose groups are these; without one this face itself."""
        return self if self.client is None else self.client

    @property
    def overflow(self) -> bool:
        """Was the last update skipped?"""
        m = self.engine.metrics
        return m is not None and not bool(m.ok)

    def override_loss_scale(self, scale: float) -> None:
        """Another loss scale from the next window on."""
        self.engine.set_loss_scale(float(scale))

    def state_dict(self) -> dict[str, Any]:
        """The groups alone; moments are in engine.save_checkpoint."""
        return {"state": {}, "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The groups' numbers.

        Raises:
          ValueError: there are more groups, or fewer; nothing is written then.
        """
        saved, own = len(state_dict["param_groups"]), len(self.param_groups)
        if saved != own:
            raise ValueError(
                f"optimizer.load_state_dict: it has {saved} groups, and there are {own} here; build them alike"
            )
        for g, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            g.update({k: v for k, v in theirs.items() if k != "params"})


def _number(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return tuple(map(float, x))
    return float(x) if isinstance(x, (int, float, Tensor)) and not isinstance(x, bool) else x


def with_numbers(given: Sequence[Mapping[str, Any]], groups: Sequence[Numbers]) -> list[dict[str, Any]]:
    """Groups of parameters with their numbers."""
    return [{**g, **n} for g, n in zip(given, groups, strict=True)]

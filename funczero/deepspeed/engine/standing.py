"""What an engine stands on: a module, a step and its state. Who reads and writes them goes through here, so that nobody
goes on with what a failed call has left amid its writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from funczero.core.types import TrainState
from funczero.deepspeed.engine.graphs import leaves_under
from funczero.deepspeed.engine.holder import Holder
from funczero.deepspeed.engine.leaf import check_leaf, write_leaf
from funczero.layout.mesh import Mesh
from funczero.step.calls import recorded
from funczero.step.step import Step
from funczero.step.train_step import donate

Found = TypeVar("Found")  # what a call gives


class Standing(nn.Module):
    """A module, a step and its state, which stand in memory that is shared and written in place."""

    def __init__(self, holder: Holder, step: Step, state: TrainState) -> None:
        """holder: how a forward reads the module's parameters."""
        super().__init__()
        self.module = holder.module
        self._holder, self.train_step, self._state = holder, step, state
        self._step = donate(step)
        self._clock = [0]  # windows closed: what a graph was built in
        self._left = ""  # the call that failed when it had begun to write
        self.optimizer: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:  # a plain attribute: a module's own way takes ten times as long
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def check_whole(self, call: str) -> None:
        """Refuse what an engine holds that a failed call has left amid its writing.

        Raises:
          RuntimeError: it has; a loaded checkpoint mends it.
        """
        if self._left:
            why = (
                f"{self._left} has failed when it had begun to write, so that weights and moments may be of two updates"
            )
            remedy = "load a checkpoint with engine.load_checkpoint, or build the module and its engine anew"
            raise RuntimeError(f"{call}: {why}; {remedy}")

    @property
    def live_mesh(self) -> Mesh:
        """The mesh with its process groups."""
        return self._step.live_mesh

    @property
    def state(self) -> TrainState:
        """The chain's state with the optimizer's groups as they show now.

        `engine.train_step(engine.state, ...)` goes on without the engine.
        """
        self.check_whole("engine.state")
        return self._state if self.optimizer is None else self.optimizer.push(self._state)

    @state.setter
    def state(self, state: TrainState) -> None:
        """Parameters and the optimizer's face follow."""
        state = self._step.fits.settled(state)
        before, self._left = self._left, self._left or "engine.state = ..."
        self._state = state
        self._clock[0] += 1
        self._holder.renew(self._step, state)
        if self.optimizer is not None:
            self.optimizer.pull(state)
        self._left = before

    @property
    def global_steps(self) -> int:
        """Windows closed, skipped updates included."""
        now = int(self._state.step)
        return now if now >= 0 else -1 - now  # of a state that a failed update has used up

    def reached_by(self, loss: Tensor) -> bool:
        """Does a loss depend on parameters of this engine?"""
        return any(self._holder.owns(x) for x in leaves_under(loss))

    def keep(self, own: Any) -> None:
        """Another state of one transform, for the next update; parameters and the open window stand still."""
        self._state = self._step.with_state(self._state, own)

    def inside(self, fn: Callable[..., Found], /, *args: Any, **kwargs: Any) -> Found:
        """fn(*args, **kwargs), which may read the module's parameters; at stage 3 all ranks call it alike."""
        self.check_whole("a method of engine.module")
        return self._holder.inside(fn, *args, **kwargs)

    def together(self, call: str, fn: Callable[[], Found]) -> Found:
        """fn(), which sends; where a rank makes this call and another does not, all are told."""
        self.check_whole(call)
        return recorded(call, lambda state: fn(), self._step.running)(self._state)

    def write_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Whole values by name into the masters, which forwards read from now on; every rank gives the same.

        Raises:
          ValueError: one has another shape; nothing is written then.
        """
        self.check_whole("writing parameters")
        for name, value in values.items():
            check_leaf(self._state.params, name, value)
        self._left = "writing parameters"
        for name, value in values.items():
            write_leaf(self._state, name, value)
        self.state = self._state
        self._left = ""

    def refresh_parameters(self) -> None:
        """The module's parameters show the state again, after somebody opened them."""
        self._holder.refresh()

    def stray_gradient(self) -> str | None:
        """A parameter with a gradient of loss.backward(), of which the engine has not heard."""
        return self._holder.stray_gradient()

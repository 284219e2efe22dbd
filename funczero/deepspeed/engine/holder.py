"""How an engine's forward reads parameters: one interface, of which a stage picks one implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from funczero.core.types import TrainState
from funczero.deepspeed.engine.held import Held
from funczero.layout.spec import P
from funczero.step.step import Step
from funczero.transforms.chain import Source


class Holder(Protocol):
    """What stands between a module's parameters and a chain's state.

    It is `WholeParameters` at stages 0 to 2, and `ShardedParameters` at stage 3.
    """

    kind: type[Held]  # what a parameter of the module is, for as long as an engine holds it
    module: nn.Module  # the user's
    named: dict[str, nn.Parameter]  # every parameter by its dotted names, tied ones under each of them

    def source(self, batch: P, trainable: Callable[[str], bool]) -> Source:
        """The gradient at the left end of the engine's chain, which takes what `pull` returns."""

    def start(self, threshold: int, step: Step) -> dict[str, Any]:
        """The parameters that the state begins with, ties kept.

        Args:
          threshold: leaves with fewer elements are needed whole.
          step: which reads them.
        """

    def attach(self) -> None:
        """The module belongs to the engine from now on."""

    def release(self) -> None:
        """The module's methods are its own again."""

    def renew(self, step: Step, state: TrainState) -> None:
        """Forwards read the parameters of this state; graphs over older ones can no longer be differentiated."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""

    def inside(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """fn(*args, **kwargs), which reads the module's parameters; all ranks call it alike."""

    def owns(self, leaf: Tensor) -> bool:
        """Does this leaf of a loss's graph stand for parameters of the module?"""

    def pull(self, loss: Tensor, retain: bool, over: float, others: list[tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        """The vector-Jacobian product of a loss for the chain.

        Args:
          retain: the loss's graph is used once more.
          others: is given what else learns, with its gradient of loss / over.
        """

    def refresh(self) -> None:
        """Parameters show the state again after somebody opened them; their writes so far are known."""

    def written(self) -> str | None:
        """A parameter that somebody wrote into since the last update, so that the masters did not hear of it."""

    def stray_gradient(self) -> str | None:
        """A parameter with a gradient of loss.backward(), of which the engine has not heard."""

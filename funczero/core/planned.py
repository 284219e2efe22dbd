"""Is this a plan: a step that runs on tensors without values?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Planned:
    """A mode of torch in which nothing is computed, as `fz.plan` opens one, with what a loss meets there."""

    def __init__(self, mesh: Any = None) -> None:
        """mesh: the one that is planned for; None: none is."""
        super().__init__()
        self.mesh = mesh
        self._there: dict[int, tuple[Any, Any]] = {}

    def there(self, real: Any, make: Callable[[], Any]) -> Any:
        """What lies on the mesh of the plan in place of something that lies on one of its own; made once a plan."""
        if id(real) not in self._there:
            self._there[id(real)] = real, make()
        return self._there[id(real)][1]


def planned() -> Planned | None:
    """Such a mode, where one is open in this thread. Fake tensors alone do not say so: a trace of a step has them, too.

    >>> planned() is None
    True
    """
    modes = _get_current_dispatch_mode_stack()
    return next((mode for mode in modes if isinstance(mode, Planned)), None)

"""Is this a plan: a step that runs on tensors without values?"""

from __future__ import annotations

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Planned:
    """A mode of torch in which nothing is computed, as `fz.plan` opens one."""


def planned() -> bool:
    """Is such a mode open in this thread? Fake tensors alone do not say so: a trace of a step has them, too.

    >>> planned()
    False
    """
    return any(isinstance(mode, Planned) for mode in _get_current_dispatch_mode_stack())

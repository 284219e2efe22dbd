"""Names in a trace: what runs is called there what it is called in the printed chain."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

MARK = "funczero: "  # before every name, so that a trace's own names are told from torch's
_enabled = torch._C._autograd._profiler_enabled
_Named: Any = torch._C._profiler._RecordFunctionFast
_SILENT = nullcontext()


def span(*words: str) -> AbstractContextManager[Any]:
    """A stretch of a profile under a name of some words; without a profiler it costs 0.05 us and does nothing.

    >>> with torch.profiler.profile() as seen, span("adamw"):
    ...     _ = torch.ones(2) + 1
    >>> [e.name for e in seen.events() if e.name.startswith(MARK)]
    ['funczero: adamw']
    """
    return _Named(MARK + " ".join(words)) if _enabled() else _SILENT

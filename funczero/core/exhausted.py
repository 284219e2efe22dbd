"""Memory that is not there: the error that torch raises goes on, with a sentence on what asked for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TOLD = "out of memory"  # begins every sentence of ours
HOLDS = "its state holds"  # what is said of a state


def told(error: BaseException, where: Callable[[], str]) -> None:
    """Adds what asked for memory to an error of an allocator; any other error stays as it is.

    Args:
      where: says it, and is called only then. The first to say it is the innermost.

    >>> error = torch.OutOfMemoryError("CUDA out of memory")
    >>> told(error, lambda: "in the forward of unit 'blocks/3'"), error.__notes__
    (None, ["out of memory in the forward of unit 'blocks/3'"])
    """
    if of_memory(error) and not any(n.startswith(TOLD) for n in getattr(error, "__notes__", ())):
        error.add_note(f"{TOLD} {where()}")


@contextmanager
def asking(where: Callable[[], str], holds: Callable[[], str] | None = None) -> Iterator[None]:
    """Inside, who asks for memory and finds none is told.

    Args:
      holds: says what this rank holds, at the edge of a call that knows it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told(error, where)
        if holds is not None:
            held(error, holds)
        raise


def amid(after: str = "") -> str:
    """Where a backward asks for memory.

    Args:
      after: how far it has come.
    """
    return f"in the backward{after}: gradients, and what a forward kept"


def held(error: BaseException, what: Callable[[], str]) -> None:
    """Adds what this rank holds to an error of an allocator, once: the first to say it knows the call."""
    if of_memory(error) and not any(HOLDS in n for n in getattr(error, "__notes__", ())):
        error.add_note(what())


def of_memory(error: BaseException) -> bool:
    """Is it the error of an allocator, of an accelerator or of the host?"""
    words = "allocate memory", "not enough memory"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def size(tensors: Iterable[Tensor]) -> str:
    """Bytes of tensors, in MiB.

    >>> size([torch.zeros(1 << 20)])
    '4.0 MiB'
    """
    return f"{sum(x.nbytes for x in tensors) / 2**20:,.1f} MiB"

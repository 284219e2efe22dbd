"""What a block's values depend on beside its arguments, so that a block that runs twice computes the same function
twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from funczero.gradients.draws import generators


class Surroundings(NamedTuple):
    """Autocast by device type, the default dtype, and torch's generators, as a first run found them."""

    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    dtype: torch.dtype
    device: torch.device
    generators: tuple[torch.Tensor, ...]


def here(device: torch.device) -> Surroundings:
    """The surroundings of this place in the program, for computations on a device."""
    kinds = dict.fromkeys(("cpu", device.type))
    autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return Surroundings(autocast, torch.get_default_dtype(), device, tuple(g.get_state() for g in generators(device)))


@contextmanager
def restored(s: Surroundings) -> Iterator[None]:
    """The surroundings of a first run around a second; afterwards all is as it was."""
    dtype, found = torch.get_default_dtype(), generators(s.device)
    before = [g.get_state() for g in found]
    try:
        torch.set_default_dtype(s.dtype)
        for g, state in zip(found, s.generators, strict=True):
            g.set_state(state)
        with ExitStack() as stack:
            for kind, enabled, narrow in s.autocast:
                stack.enter_context(torch.autocast(kind, narrow, enabled))
            yield
    finally:
        torch.set_default_dtype(dtype)
        for g, state in zip(found, before, strict=True):
            g.set_state(state)


class Uncached:
    """Autocast without its cache of weights: whether a weight is a leaf, and so cached, must not depend on where it
    rests.
    """

    def __enter__(self) -> None:
        self.before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_cache_enabled(self.before)

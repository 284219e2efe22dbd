"""Keys as values: randomness named by what it is for, never by who draws it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

UNKNOWN = -1  # in place of a key that cannot be read: it is batched by vmap, or traced


def known(x: Tensor) -> int | None:
    """The value of a 0-d tensor of integers; None where vmap batches it or make_fx traces it."""
    if get_proxy_mode() is not None:
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return None
        x = torch._C._functorch.get_unwrapped(x)
    return int(x)


def fold(key: int, *uses: int | str) -> int:
    """A new key from a key and what it is used for; 63 bits.

    >>> fold(0, 1) == fold(0, 1), fold(0, 1) == fold(1, 0)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr((key, *uses)).encode(), digest_size=8).digest(), "big") >> 1


def generator(key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by a key."""
    return torch.Generator(device).manual_seed(key)


def dropout(x: Tensor, p: float, key: int) -> Tensor:
    """x with each value dropped with probability p and the rest scaled by 1 / (1 - p); the same mask for the same key.

    Raises:
      ValueError: p is not in [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p={p} is not a probability below 1")
    if p == 0:
        return x
    keep = torch.empty(x.shape, device=x.device, dtype=torch.float32).uniform_(generator=generator(key, x.device)) >= p
    return x * keep.to(x.dtype) / (1 - p)


def normal(key: int, shape: Iterable[int], std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values for a leaf, drawn on the CPU so that every device starts from the same ones."""
    return torch.randn(tuple(shape), generator=generator(key), dtype=dtype) * std

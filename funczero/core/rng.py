"""Keys as values: randomness named by what it is for, never by who draws it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from math import prod

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


# --- values named by a row's key or by their place: the same however rows and leaves are split ------------------------
def row_keys(key: int, n: int, start: int = 0) -> Tensor:
    """Keys of n rows, int64 [n], each a function of (key, its number) alone: a leaf of a global batch, dealt like x.

    A dataset has them already: `Row.key`.

    >>> bool((row_keys(1, 2, start=3) == row_keys(1, 5)[3:]).all())
    True
    """
    return _mixed(key, torch.arange(start, start + n))


def row_normal(keys: Tensor, shape: Iterable[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values [n, *shape], where row i is a function of keys[i] alone; the same on any split of the rows.

    Args:
      keys: int64 [n].

    >>> keys = row_keys(0, 4)
    >>> bool((row_normal(keys, (3,))[2:] == row_normal(keys[2:], (3,))).all())
    True
    """
    return normal_at(0, _by_row(keys, "normal", shape), dtype)


def row_uniform(keys: Tensor, shape: Iterable[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """As row_normal, uniform in (0, 1); `(row_uniform(keys) * steps).long()` are numbers below `steps`."""
    return _uniform(_mixed(0, _by_row(keys, "uniform", shape)), dtype)


def normal_at(key: int, place: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of the shape of `place`, int64, each a function of (key, place) alone.

    torch.special.ndtri is computed value by value, so that no bit depends on a value's neighbours.
    """
    values: Tensor = torch.special.ndtri(_uniform(_mixed(key, place), torch.float64))
    return values.to(dtype)


def _by_row(keys: Tensor, use: str, shape: Iterable[int]) -> Tensor:
    """Places [n, *shape], by row."""
    shape = tuple(shape)
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.dim() != 1:
        have = f"{keys.dtype} of shape {tuple(keys.shape)}" if isinstance(keys, Tensor) else f"a {type(keys).__name__}"
        raise TypeError(f"row_{use}: keys are {have}; give int64 [rows], as fz.rng.row_keys(key, rows) or Row.key")
    own = _mixed(fold(0, use), keys)
    within = torch.arange(prod(shape), device=keys.device) * GOLDEN
    return (own[:, None] + within).view(len(keys), *shape)


GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's, as int64


def _mixed(key: int, x: Tensor) -> Tensor:
    """splitmix64 of key + x * its golden step: 64 bits that look random, in integers, which have no order."""
    x = x * GOLDEN + (key - (1 << 64) if key >= 1 << 63 else key)
    x = (x ^ _down(x, 30)) * FIRST
    x = (x ^ _down(x, 27)) * SECOND
    return x ^ _down(x, 31)


def _down(x: Tensor, by: int) -> Tensor:
    """A shift that brings in zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """In (0, 1), exact in the dtype."""
    digits = round(-math.log2(torch.finfo(dtype).eps))
    return ((_down(bits, 64 - digits).double() + 0.5) * 2.0**-digits).to(dtype)

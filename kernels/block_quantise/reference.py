"""Symmetric block-wise quantisation in plain torch: the largest magnitude of a block, and a code for every value.

`quantise`, `dequantise` and `requantise` are what is called; the others are what they are made of.

A flat x[n] is made of parts, whose lengths add up to n. Blocks restart at every part, and the last block of a part may
be short, so no value depends on another part's. A code is `round(x / absmax * qmax)` and reads `(code / qmax) *
absmax`: the largest value of a block is exact, and the error of the others is at most absmax / (2 qmax).

Source: Wang et al., ZeRO++, arXiv 2306.10209, section 3; its scale is absmax / (qmax + 1), which loses the maximum.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

Lengths = tuple[int, ...]
INTEGERS = {"int8": 127, "int4": 7}  # the largest code by form
FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def payload(n: int, form: str) -> int:
    """Bytes of the codes of n values."""
    return -(-n // 2) if form == "int4" else n


def fits(x: Tensor | None, codes: Tensor | None, tops: Tensor | None, lengths: Lengths, block: int, form: str) -> bool:
    """Are these as long as parts of such lengths have values, codes and blocks? A fast form does not look again."""
    n = sum(lengths)
    return (
        block > 0
        and min(lengths, default=0) >= 0
        and (x is None or x.shape == (n,))
        and (codes is None or (codes.shape == (payload(n, form),) and codes.dtype == torch.uint8))
        and (tops is None or tops.shape == (sum(-(-m // block) for m in lengths),))
    )


def quantise(
    x: Tensor,
    lengths: Lengths,
    block: int,
    form: str,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes of x, uint8 [payload(n, form)], and the largest magnitude of every block, [blocks].

    Args:
      x: [n] in any floating dtype; it is computed in float32, or float64, and the magnitudes come in that.
      form: "int8", "int4" (two to a byte), "e4m3" or "e5m2".
      generator: of integers: rounds up with the probability of the remainder, so that the mean of many draws is x;
        None: to nearest.
      out: uint8 [payload], written and returned.

    >>> quantise(torch.tensor([1.0, -2.0, 4.0]), (3,), 4, "int8")
    (tensor([ 32, 192, 127], dtype=torch.uint8), tensor([4.]))
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tops = absmax(x, lengths, block)
    if form in FLOATS:
        codes = code_fp8(x, tops, lengths, block, FLOATS[form]).view(torch.uint8)
    else:
        codes = code_int(x, tops, lengths, block, INTEGERS[form], generator)
        codes = join_nibbles(codes) if form == "int4" else codes.view(torch.uint8)
    return (codes if out is None else out.copy_(codes)), tops


def dequantise(
    codes: Tensor, tops: Tensor, lengths: Lengths, block: int, form: str, dtype: torch.dtype | None = None
) -> Tensor:
    """The values of codes, [n], computed in tops' dtype and rounded to `dtype`.

    >>> dequantise(*quantise(torch.tensor([1.0, -2.0, 4.0]), (3,), 4, "int8"), (3,), 4, "int8")
    tensor([ 1.0079, -2.0157,  4.0000])
    """
    if form in FLOATS:
        x = read_fp8(codes.view(FLOATS[form]), tops, lengths, block)
    else:
        whole = split_nibbles(codes, sum(lengths)) if form == "int4" else codes.view(torch.int8)
        x = read_int(whole, tops, lengths, block, INTEGERS[form])
    return x.to(dtype or x.dtype)


def requantise(
    codes: Tensor,
    tops: Tensor,
    x: Tensor,
    lengths: Lengths,
    block: int,
    form: str,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and magnitudes of what these codes read as, plus x: dequantise, add, quantise.

    Args:
      x: [n] in any floating dtype, added in tops' dtype.

    >>> coded = quantise(torch.tensor([1.0, -2.0, 4.0]), (3,), 4, "e4m3")
    >>> requantise(*coded, torch.tensor([0.0, 0.0, 4.0]), (3,), 4, "e4m3")[1]
    tensor([8.])
    """
    return quantise(dequantise(codes, tops, lengths, block, form) + x.to(tops.dtype), lengths, block, form, generator)


@lru_cache(maxsize=256)
def runs(lengths: Lengths, block: int) -> tuple[tuple[int, int], ...]:
    """Neighbouring blocks of one size, as (how many, values in each): each run is one matrix.

    >>> runs((8, 4, 6), 4)
    ((4, 4), (1, 2))
    """
    sizes: list[int] = []
    for n in lengths:
        sizes += [block] * (n // block) + [n % block] * (n % block > 0)
    return tuple((len(list(same)), size) for size, same in groupby(sizes))


def _matrices(x: Tensor, lengths: Lengths, block: int) -> list[Tensor]:
    """x[n] as views [blocks, values], one a run."""
    shapes = runs(lengths, block)
    return [part.view(shape) for part, shape in zip(x.split([k * m for k, m in shapes]), shapes, strict=True)]


def _columns(tops: Tensor, lengths: Lengths, block: int) -> list[Tensor]:
    """A number a block as views [blocks, 1], one a run."""
    return [part.view(-1, 1) for part in tops.split([k for k, _ in runs(lengths, block)])]


def absmax(x: Tensor, lengths: Lengths, block: int) -> Tensor:
    """The largest magnitude of every block, [blocks] in x's dtype; nan for a block that holds inf or nan.

    >>> absmax(torch.tensor([1.0, -3.0, 2.0, float("inf")]), (3, 1), 2)
    tensor([3., 2., nan])
    """
    # two reductions, because aminmax is not vectorised along a dim: 13 times their time on a CPU
    tops = [torch.maximum(-part.amin(1), part.amax(1)) for part in _matrices(x, lengths, block)]
    out = torch.cat(tops) if tops else x.new_empty(0)
    return torch.where(out.isfinite(), out.abs(), torch.nan)  # zeros have one sign, whichever way they were found


def _scaled(x: Tensor, tops: Tensor, lengths: Lengths, block: int, qmax: float) -> Tensor:
    """x / absmax * qmax; 0 in a block of zeros, and in one that reads as nan whatever its codes are."""
    divisor, scaled = torch.where(tops > 0, tops, 1), torch.empty_like(x)
    parts = (_matrices(scaled, lengths, block), _matrices(x, lengths, block), _columns(divisor, lengths, block))
    for out, part, top in zip(*parts, strict=True):
        torch.div(part, top, out=out)
    return scaled.mul_(qmax).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _unscaled(x: Tensor, tops: Tensor, lengths: Lengths, block: int) -> Tensor:
    """x, times its block's absmax in place."""
    for part, top in zip(_matrices(x, lengths, block), _columns(tops, lengths, block), strict=True):
        part.mul_(top)
    return x


def code_int(
    x: Tensor, tops: Tensor, lengths: Lengths, block: int, qmax: int, generator: torch.Generator | None = None
) -> Tensor:
    """int8 [n] in -qmax .. qmax.

    Args:
      x: in float32 or float64, as tops.
      generator: rounds up with the probability of the remainder, so that the mean of many draws is x. None: to nearest.

    >>> code_int(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([2.0, 0.0]), (2, 1), 2, 127)
    tensor([  64, -127,    0], dtype=torch.int8)
    """
    scaled = _scaled(x, tops, lengths, block, qmax)
    if generator is None:
        return scaled.round_().clamp_(-qmax, qmax).to(torch.int8)
    below = scaled.floor()
    draws = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (below + (draws < scaled - below)).clamp_(-qmax, qmax).to(torch.int8)


def read_int(codes: Tensor, tops: Tensor, lengths: Lengths, block: int, qmax: int) -> Tensor:
    """The values of int8 codes, [n] in tops' dtype; nan in a block whose absmax is nan."""
    return _unscaled(codes.to(tops.dtype).div_(qmax), tops, lengths, block)


def code_fp8(x: Tensor, tops: Tensor, lengths: Lengths, block: int, dtype: torch.dtype) -> Tensor:
    """[n] in an 8-bit floating dtype, scaled so that a block's largest magnitude is the largest finite code."""
    top = torch.finfo(dtype).max
    return _scaled(x, tops, lengths, block, top).clamp_(-top, top).to(dtype)


def read_fp8(codes: Tensor, tops: Tensor, lengths: Lengths, block: int) -> Tensor:
    """The values of 8-bit floating codes, [n] in tops' dtype."""
    return _unscaled(codes.to(tops.dtype).div_(torch.finfo(codes.dtype).max), tops, lengths, block)


def join_nibbles(codes: Tensor) -> Tensor:
    """Codes in -8 .. 7 two to a byte, uint8 [ceil(n / 2)]; an odd last one stands alone."""
    raised = codes + 8
    if raised.numel() % 2:
        raised = torch.cat([raised, raised.new_full((1,), 8)])
    pairs = raised.view(torch.int16)  # the first code of a pair is the low byte, on every machine that torch runs on
    return (pairs | (pairs >> 4)).to(torch.uint8)


def split_nibbles(joined: Tensor, n: int) -> Tensor:
    """The n codes that join_nibbles was given, int8.

    >>> split_nibbles(join_nibbles(torch.tensor([-7, 0, 7], dtype=torch.int8)), 3)
    tensor([-7,  0,  7], dtype=torch.int8)
    """
    pairs = joined.to(torch.int16)
    both = ((pairs | (pairs << 4)) & 0x0F0F).view(torch.int8)
    return both[:n] - 8

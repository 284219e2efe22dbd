"""Block quantisation in Triton, for CUDA and ROCm: one program a block. Codes are made by integer operations alone, so
that nothing depends on which 8-bit types a device has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from funczero.kernels.block_quantise import reference
from funczero.kernels.block_quantise.reference import FLOATS, INTEGERS, Lengths, fits, payload
from funczero.kernels.segments import bounds_of, divided, magnitude, narrow, segments, stored

MOST = 1 << 15  # values of a block that one program holds
KEPT = {"e4m3": 3, "e5m2": 2, "int8": 0, "int4": 0}  # bits of a fraction


def quantise(
    x: Tensor,
    lengths: Lengths,
    block: int,
    form: str,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    if not (_takes(x, block) and fits(x, out, None, lengths, block, form)) or (
        out is not None and not out.is_contiguous()
    ):
        return reference.quantise(x, lengths, block, form, generator, out)
    wide = torch.promote_types(x.dtype, torch.float32)
    return _quantised(x, lengths, block, form, generator, out, None, wide)


def dequantise(
    codes: Tensor, tops: Tensor, lengths: Lengths, block: int, form: str, dtype: torch.dtype | None = None
) -> Tensor:
    """As the reference's."""
    dtype = dtype or tops.dtype
    if not (
        _takes(codes, block)
        and fits(None, codes, tops, lengths, block, form)
        and tops.is_contiguous()
        and dtype.is_floating_point
        and dtype.itemsize > 1
    ):
        return reference.dequantise(codes, tops, lengths, block, form, dtype)
    out = torch.empty(sum(lengths), dtype=dtype, device=codes.device)
    _, starts, sizes = segments(bounds_of(lengths), block, codes.device)
    if len(starts):
        _dequantise[(len(starts),)](
            codes, tops, starts, sizes, stored(out), tops.dtype == torch.float64, form == "int4", KEPT[form],
            _limit(form), dtype == torch.bfloat16, dtype == torch.float16, triton.next_power_of_2(block),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def requantise(
    codes: Tensor,
    tops: Tensor,
    x: Tensor,
    lengths: Lengths,
    block: int,
    form: str,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    if not (
        _takes(x, block)
        and fits(x, codes, tops, lengths, block, form)
        and codes.is_contiguous()
        and tops.is_contiguous()
    ):
        return reference.requantise(codes, tops, x, lengths, block, form, generator)
    return _quantised(x, lengths, block, form, generator, None, (codes, tops), tops.dtype)


def _takes(x: Tensor, block: int) -> bool:
    return x.is_contiguous() and x.dim() == 1 and block <= MOST and not x.requires_grad


def _limit(form: str) -> float:
    return torch.finfo(FLOATS[form]).max if form in FLOATS else float(INTEGERS[form])


def _quantised(
    x: Tensor,
    lengths: Lengths,
    block: int,
    form: str,
    generator: torch.Generator | None,
    out: Tensor | None,
    read: tuple[Tensor, Tensor] | None,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    n, device = x.numel(), x.device
    _, starts, sizes = segments(bounds_of(lengths), block, device)
    single = torch.empty(n, dtype=torch.uint8, device=device) if form == "int4" or out is None else out
    tops = torch.empty(len(starts), dtype=wide, device=device)
    drawn = generator is not None and form not in FLOATS
    draws = torch.rand(x.shape, generator=generator, dtype=wide, device=device) if drawn else tops
    codes, read_tops = (single, tops) if read is None else read
    if len(starts):
        _quantise[(len(starts),)](
            x, draws, codes, read_tops, starts, sizes, single, tops, wide == torch.float64, drawn, read is not None,
            form == "int4", KEPT[form], _limit(form), triton.next_power_of_2(block), enable_fp_fusion=False,
        )  # fmt: skip
    if form != "int4":
        return single, tops
    joined = torch.empty(payload(n, form), dtype=torch.uint8, device=device) if out is None else out
    if n:
        _join[(triton.cdiv(len(joined), 1024),)](single, joined, n, 1024)
    return joined, tops


@triton.jit
def _read(
    codes,
    top,
    start,
    n,
    WIDE: tl.constexpr,
    NIBBLES: tl.constexpr,
    KEPT: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # noqa: E501
    """The values of a block's codes."""
    lane = tl.arange(0, WIDTH)
    at = start + lane
    if NIBBLES:
        byte = tl.load(codes + at // 2, mask=lane < n, other=0).to(tl.int32)
        code = ((byte >> ((at % 2) * 4).to(tl.int32)) & 15) - 8
    else:
        code = tl.load(codes + at, mask=lane < n, other=0).to(tl.int32)
    if KEPT == 0:
        if not NIBBLES:
            code = tl.where(code > 127, code - 256, code)
        value = code.to(tl.float32)
    else:
        BIAS: tl.constexpr = 7 if KEPT == 3 else 15
        exponent, rest = (code & 127) >> KEPT, code & ((1 << KEPT) - 1)
        normal = (((exponent + (127 - BIAS)) << 23) | (rest << (23 - KEPT))).to(tl.float32, bitcast=True)
        small = rest.to(tl.float32) * (2.0 ** (1 - BIAS - KEPT))
        value = tl.where(exponent == 0, small, normal)
        if KEPT == 3:
            value = tl.where((code & 127) == 127, float("nan"), value)
        else:
            value = tl.where(exponent == 31, tl.where(rest == 0, float("inf"), float("nan")), value)
        value = tl.where(code > 127, -value, value)
    if WIDE:
        value = value.to(tl.float64)
    return divided(value, tl.full([WIDTH], LIMIT, value.dtype)) * top


@triton.jit
def _quantise(
    x, draws, read_codes, read_tops, starts, sizes, codes, tops, WIDE: tl.constexpr, DRAWN: tl.constexpr,
    ADDED: tl.constexpr, NIBBLES: tl.constexpr, KEPT: tl.constexpr, LIMIT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, lane = tl.program_id(0), tl.arange(0, WIDTH)
    start, n = tl.load(starts + block), tl.load(sizes + block)
    inside = lane < n
    value = tl.load(x + start + lane, mask=inside, other=0).to(tl.float64 if WIDE else tl.float32)
    if ADDED:
        value = _read(read_codes, tl.load(read_tops + block), start, n, WIDE, NIBBLES, KEPT, LIMIT, WIDTH) + value
        value = tl.where(inside, value, 0.0)
    bits = tl.max(magnitude(value), 0)
    top = bits.to(value.dtype, bitcast=True)
    top = tl.where(top < float("inf"), top, float("nan"))
    tl.store(tops + block, top)
    scaled = divided(value, tl.where(top > 0, top, 1.0) + tl.zeros([WIDTH], value.dtype)) * LIMIT
    scaled = tl.where(tl.abs(scaled) < float("inf"), scaled, 0.0)
    if DRAWN:
        below = tl.floor(scaled)
        draw = tl.load(draws + start + lane, mask=inside, other=0)
        scaled = below + tl.where(draw < scaled - below, 1.0, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
    if KEPT == 0:
        if WIDE:  # adding 1.5 * 2**52 rounds to even, and leaves the integer in the low bits
            code = (scaled + 6755399441055744.0).to(tl.int64, bitcast=True).to(tl.int32)
        else:
            code = (scaled + 12582912.0).to(tl.int32, bitcast=True)
    else:
        BIAS: tl.constexpr = 7 if KEPT == 3 else 15
        unit = tl.full([WIDTH], (127 + 24 - BIAS - KEPT) << 23, tl.int32)
        whole = scaled.to(tl.float32).to(tl.int32, bitcast=True)
        size = whole & 0x7FFFFFFF
        small = (size.to(tl.float32, bitcast=True) + unit.to(tl.float32, bitcast=True)).to(
            tl.int32, bitcast=True
        ) - unit
        odd = (size >> (23 - KEPT)) & 1
        normal = (size - ((127 - BIAS) << 23) + (1 << (22 - KEPT)) - 1 + odd) >> (23 - KEPT)
        code = tl.where(size < ((128 - BIAS) << 23), small, normal) | tl.where(whole < 0, 128, 0)
    tl.store(codes + start + lane, (code & 255).to(tl.uint8), mask=inside)


@triton.jit
def _dequantise(
    codes, tops, starts, sizes, out, WIDE: tl.constexpr, NIBBLES: tl.constexpr, KEPT: tl.constexpr,
    LIMIT: tl.constexpr, BFLOAT: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, lane = tl.program_id(0), tl.arange(0, WIDTH)
    start, n = tl.load(starts + block), tl.load(sizes + block)
    value = _read(codes, tl.load(tops + block), start, n, WIDE, NIBBLES, KEPT, LIMIT, WIDTH)
    tl.store(out + start + lane, narrow(value, BFLOAT, HALF), mask=lane < n)


@triton.jit
def _join(codes, joined, n, WIDTH: tl.constexpr):
    byte = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    low = tl.load(codes + 2 * byte, mask=2 * byte < n, other=0).to(tl.int32)
    high = tl.load(codes + 2 * byte + 1, mask=2 * byte + 1 < n, other=0).to(tl.int32)
    both = ((low + 8) & 15) | (((high + 8) & 15) << 4)
    tl.store(joined + byte, both.to(tl.uint8), mask=2 * byte < n)

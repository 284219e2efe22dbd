"""Quantising wires: small integers or 8-bit floats, and one scale a block.

Blocks restart at every slot, so a leaf's values depend on nothing that shares its message, and replicas of a leaf that
is not cut stay equal, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from funczero.comm.wire import Lengths, Wire
from funczero.core import rng
from funczero.kernels.block_quantise.reference import FLOATS, payload
from funczero.kernels.registry import kernel


def int8(block: int = 2048, stochastic: bool = False, hadamard: int = 0) -> Wire:
    """Values travel as integers of 8 bits and the largest magnitude of every block.

    Law: the error of a value that is read in float32 is at most absmax / 254 of its block (absmax / 127 with stochastic
    rounding), a block's largest value and a constant block are exact, and a block that holds inf or nan reads as nan.
    Views are then rounded to their dtype. Masters never pass a wire. Bytes: n and a scale a block, in the dtype of the
    values.

    Args:
      block: values that share a scale; the last block of a slot may be short.
      stochastic: round at random, without bias; draws are keyed by run, update, axis, rank and unit.
      hadamard: values are rotated in groups of so many before they are rounded, so that one large value does not cost
        its neighbours their precision; 0: not. What is left over at a slot's end is not, and has a scale of its own.

    Raises:
      ValueError: a block or a group that is no size.

    Source: Wang et al., ZeRO++, arXiv 2306.10209 (DeepSpeed: zero_quantized_weights).

    >>> wire = int8(4)
    >>> wire.unpack(wire.pack(torch.tensor([1.0, -2.0, 4.0]), (3,), 0), (3,), torch.float32)
    tensor([ 1.0079, -2.0157,  4.0000])
    """
    return _integers("int8", block, stochastic, hadamard)


def int4(block: int = 512, stochastic: bool = False, hadamard: int = 0) -> Wire:
    """As int8, in 4 bits: the error of a value is at most absmax / 14 of its block (absmax / 7 with stochastic
    rounding); two values share a byte.

    Source: Wang et al., ZeRO++, arXiv 2306.10209 (DeepSpeed: zero_quantized_gradients).

    >>> int4(512).nbytes((1024,), torch.float32)
    520
    """
    return _integers("int4", block, stochastic, hadamard)


def fp8(block: int = 2048, form: str = "e4m3") -> Wire:
    """Values travel as 8-bit floats and the largest magnitude of every block, which is exact.

    Law: a value's error is at most 2^-4 of it in "e4m3", 2^-3 in "e5m2", and 2^-18 of absmax near zero.

    Args:
      block: values that share a scale.
      form: "e4m3" or "e5m2".

    Raises:
      ValueError: a block that is no size, or an 8-bit float that does not exist.

    >>> print(fp8(64), fp8(64).nbytes((128,), torch.bfloat16))
    fp8(64) 132
    """
    _sizes("fp8", block, 0)
    if form not in FLOATS:
        raise ValueError(f"fp8: form={form!r} does not exist; write one of {list(FLOATS)}")
    return _wire(f"fp8({block}{'' if form == 'e4m3' else f', {form}'})", _Codec(form, block))


# --- how a buffer is made ---------------------------------------------------------------------------------------------
class _Codec(NamedTuple):
    """Codes of a form. A buffer holds the scales, then the codes, padded to whole scales."""

    form: str
    block: int
    hadamard: int = 0
    stochastic: bool = False

    def parts(self, lengths: Lengths) -> Lengths:
        """What blocks restart at: slots, and in each the values that no group of a rotation takes."""
        if not self.hadamard:
            return lengths
        return tuple(m for n in lengths for m in (n - n % self.hadamard, n % self.hadamard) if m)

    def scales(self, lengths: Lengths) -> int:
        return sum(-(-n // self.block) for n in self.parts(lengths))

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """A block's absmax is one of its values, and so exact in their dtype, unless they are rotated."""
        return torch.promote_types(dtype, torch.float32) if self.hadamard else dtype

    def nbytes(self, lengths: Lengths, dtype: torch.dtype) -> int:
        width = self.scale_dtype(dtype).itemsize
        codes: int = payload(sum(lengths), self.form)
        return self.scales(lengths) * width + -(-codes // width) * width


def _integers(form: str, block: int, stochastic: bool, hadamard: int) -> Wire:
    _sizes(form, block, hadamard)
    more = ", stochastic" * stochastic + (f", hadamard={hadamard}" if hadamard else "")
    return _wire(f"{form}({block}{more})", _Codec(form, block, hadamard, stochastic))


def _wire(name: str, codec: _Codec) -> Wire:
    def pack(x: Tensor, lengths: Lengths, key: int) -> Tensor:
        keep, size = codec.scale_dtype(x.dtype), codec.nbytes(lengths, x.dtype)
        start, stop = (n := codec.scales(lengths) * keep.itemsize), n + payload(sum(lengths), codec.form)
        lengths = codec.parts(lengths)
        if codec.hadamard:
            x = kernel("hadamard", x.device).hadamard(x.to(keep), lengths, codec.hadamard)
        generator = rng.generator(key, x.device) if codec.stochastic else None
        out = torch.empty(size, dtype=torch.uint8, device=x.device)
        quantise = kernel("block_quantise", x.device).quantise
        _, tops = quantise(x, lengths, codec.block, codec.form, generator, out[start:stop])
        out[:start] = tops.to(keep).view(torch.uint8)
        out[stop:] = 0
        return out.view(keep)

    def unpack(sent: Tensor, lengths: Lengths, dtype: torch.dtype) -> Tensor:
        n, wide = codec.scales(lengths), torch.promote_types(sent.dtype, torch.float32)
        codes, lengths = sent[n:].view(torch.uint8)[: payload(sum(lengths), codec.form)], codec.parts(lengths)
        dequantise = kernel("block_quantise", sent.device).dequantise
        to = wide if codec.hadamard else dtype
        x: Tensor = dequantise(codes, sent[:n].to(wide), lengths, codec.block, codec.form, to)
        if codec.hadamard:
            x = kernel("hadamard", x.device).hadamard_back(x, lengths, codec.hadamard)
        return x.to(dtype)

    return Wire(name, pack, unpack, codec.nbytes)


def _sizes(name: str, block: int, hadamard: int) -> None:
    for what, n, least in (("block", block, 1), ("hadamard", hadamard, 0)):
        if not isinstance(n, int) or isinstance(n, bool) or n < least:
            raise ValueError(f"{name}: {what}={n!r} is no number of values; write an int of at least {least}, as 512")
    if hadamard and (hadamard & (hadamard - 1) or block % hadamard):
        why = f"groups are powers of two that divide a block of {block}"
        raise ValueError(f"{name}: hadamard={hadamard} does not fit; {why}, as hadamard=16 with block=512")

"""What travels over a mesh axis: a wire turns a flat buffer into one flat buffer to send, and reads it again.

A wire packs the values of one unit for one rank, never a whole message, so that it changes no value which units share a
message. It sees views and gradients, never masters: `step.params`, checkpoints and exports are exact under every wire.
What does not travel is not packed: over an axis of size 1 every wire is the identity, and a leaf that an axis leaves
whole is not packed where that axis gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.core.number import dtype_name
from funczero.core.policy import dtype_of

Lengths = tuple[int, ...]  # of the slots that lie one after another in a buffer, padding included
Key = tuple[int, ...]  # what the draws of a message are folded from, the same on all ranks of an axis


class Memory(NamedTuple):
    """What a rank keeps of a sum that it sends, leaf by leaf, and adds to the next one before it is packed.

    Args:
      keep: (what was to be sent, what its readers read, the memory so far) -> the memory, elementwise, in
        `policy.accumulate` and in units of the loss that is not scaled.
      every: sums after which it begins anew; 0: never.
    """

    keep: Callable[[Tensor, Tensor, Tensor], Tensor]
    every: int = 0


class Wire(NamedTuple):
    """Two pure functions between a buffer x[n] and what is sent in its place, and how many bytes that is.

    Law: every slot is packed by itself, so that the parts of x that `lengths` names do not depend on each other; a
    value that is not finite reads as one that is not, and zeros read as zeros; the same (x, lengths, key) gives the
    same bytes. A chain tries all this when it is built.

    Args:
      name: what is printed, counted and compared among ranks; it should say the wire's numbers, as "int8(2048)".
      pack: (x[n], lengths, key) -> one flat buffer of any dtype; n = sum(lengths); draws come from
        `fz.rng.generator(key)` alone. The key is the unit's in this update, the same on all ranks that must agree.
      unpack: (sent, lengths, dtype) -> x[n] in dtype; sums are read in `policy.accumulate`, views in `policy.compute`.
      nbytes: (lengths, dtype) -> the bytes of what `pack` gives for an x of that dtype, in closed form.
      memory: what a wire of gradients keeps from one sum to the next, as error feedback does; None: nothing.
      difference: of views, send what is new against the values that its readers hold (see fz.difference).

    >>> half = Wire(
    ...     "half",
    ...     lambda x, lengths, key: x.half(),
    ...     lambda sent, lengths, dtype: sent.to(dtype),
    ...     lambda lengths, dtype: 2 * sum(lengths))
    >>> half.unpack(half.pack(torch.tensor([1.0, 0.1]), (2,), 0), (2,), torch.float32)
    tensor([1.0000, 0.1000])
    """

    name: str
    pack: Callable[[Tensor, Lengths, int], Tensor]
    unpack: Callable[[Tensor, Lengths, torch.dtype], Tensor]
    nbytes: Callable[[Lengths, torch.dtype], int]
    memory: Memory | None = None
    difference: bool = False

    def __str__(self) -> str:
        return self.name


as_born = Wire(
    "as_born",
    lambda x, lengths, key: x,
    lambda sent, lengths, dtype: sent.to(dtype),
    lambda lengths, dtype: sum(lengths) * dtype.itemsize,
)


def cast(dtype: torch.dtype | str) -> Wire:
    """Values travel rounded to a dtype; sums are still taken in `policy.accumulate`.

    Source: DeepSpeed's communication_data_type.

    >>> print(cast("bf16"), cast(torch.bfloat16).nbytes((16, 32), torch.float32))
    cast(bfloat16) 96
    """
    narrow = dtype_of(dtype, "cast")
    name = f"cast({dtype_name(narrow)})"
    return Wire(
        name,
        lambda x, lengths, key: x.to(narrow),
        lambda sent, lengths, dtype: sent.to(dtype),
        lambda lengths, dtype: sum(lengths) * narrow.itemsize,
    )


# --- several units for several ranks ----------------------------------------------------------------------------------
class Packed(NamedTuple):
    """Units that share a message, packed: the bytes for every rank, and what is needed to read those that arrive."""

    rows: Tensor  # [ranks, bytes]
    widths: list[int]  # bytes of each unit in a row
    dtypes: list[torch.dtype]  # of what each unit was packed into


def pack_units(wire: Wire, rows: Sequence[Sequence[Tensor]], lengths: Sequence[Lengths], keys: Sequence[int]) -> Packed:
    """rows[rank][unit] as one message; keys are by unit, so that a leaf which goes to all ranks is the same on them."""
    sent = [[_sent(wire, x, n, key) if n else x for x, n, key in zip(row, lengths, keys, strict=True)] for row in rows]
    flat = [x.view(torch.uint8) for row in sent for x in row]
    whole = (flat[0] if len(flat) == 1 else torch.cat(flat)).view(len(rows), -1)
    return Packed(whole, [x.nbytes for x in sent[0]], [x.dtype for x in sent[0]])


def unpack_units(
    wire: Wire, packed: Packed, got: Tensor, lengths: Sequence[Lengths], dtype: torch.dtype
) -> list[list[Tensor]]:
    """By unit: what every rank sent, [n] each in dtype; got is [ranks, bytes] as `packed.rows`."""
    out = []
    for part, born, n in zip(got.split_with_sizes(packed.widths, 1), packed.dtypes, lengths, strict=True):
        out.append([_read(wire, row.clone() if row.storage_offset() % 16 else row, born, n, dtype) for row in part])
    return out


def _sent(wire: Wire, x: Tensor, lengths: Lengths, key: int) -> Tensor:
    sent, want = wire.pack(x, lengths, key), wire.nbytes(lengths, x.dtype)
    if not isinstance(sent, Tensor) or sent.dim() != 1 or not sent.is_contiguous() or sent.nbytes != want:
        have = f"{sent.nbytes} bytes as {tuple(sent.shape)}" if isinstance(sent, Tensor) else f"a {type(sent).__name__}"
        what = f"pack gives {have} for slots of {lengths}, but nbytes says {want}"
        raise TypeError(f"wire {wire.name!r}: {what}; give one flat buffer of as many bytes")
    return sent


def _read(wire: Wire, row: Tensor, born: torch.dtype, lengths: Lengths, dtype: torch.dtype) -> Tensor:
    if not lengths:
        return row.new_empty(0, dtype=dtype)
    x = wire.unpack(row.view(born), lengths, dtype)
    if x.dtype != dtype or x.shape != (sum(lengths),):
        what = f"unpack gives {tuple(x.shape)} of {x.dtype}, but it was asked for ({sum(lengths)},) of {dtype}"
        raise TypeError(f"wire {wire.name!r}: {what}; read what was sent in that dtype")
    return x


# --- what a wire promises ---------------------------------------------------------------------------------------------
TRIED = (48, 16, 32)  # lengths of slots that a wire is tried on


def prove(wire: Wire, born: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """Tries a wire on a few values.

    Raises:
      TypeError: it is no Wire, or its functions do not give what they must.
      ValueError: it breaks a law that would make replicas diverge or hide an overflow.
    """
    if not isinstance(wire, Wire):
        raise TypeError(f"{wire!r} is no wire; write a Wire, as fz.cast('bfloat16')")
    x = torch.linspace(-2, 3, sum(TRIED), device=device).sin().to(born)
    try:
        before, first = x.clone(), _sent(wire, x, TRIED, 0).clone()
    except (RuntimeError, NotImplementedError) as error:
        why = f"cannot pack {dtype_name(born)} values on {device.type} ({str(error).splitlines()[0][:200]})"
        raise ValueError(f"wire {wire.name!r}: it {why}; write one that it can, as fz.int8(2048)") from None
    if not torch.equal(x, before):
        raise ValueError(f"wire {wire.name!r}: pack writes into the values that it is given; return new ones")
    if not torch.equal(_sent(wire, x, TRIED, 0).view(torch.uint8), first.view(torch.uint8)):
        why = "pack gives other bytes for the same values"
        raise ValueError(f"wire {wire.name!r}: {why}; draw from fz.rng.generator(key) alone")

    def again(x: Tensor) -> Tensor:
        return _read(wire, _sent(wire, x, TRIED, 0).view(torch.uint8), first.dtype, TRIED, dtype)

    if not again(x).isfinite().all():
        raise ValueError(f"wire {wire.name!r}: values between -1 and 1 do not read as finite ones")
    ends = torch.tensor(TRIED).cumsum(0).tolist()
    for start, stop in zip([0, *ends], ends, strict=False):
        other = x.clone()
        other[start:stop] *= -64
        changed, kept = again(other), torch.ones(len(x), dtype=torch.bool, device=device)
        kept[start:stop] = False
        if not torch.equal(changed[kept], again(x)[kept]):
            why = "a leaf's values depend on its neighbours', so replicas of a leaf that is not cut would differ"
            raise ValueError(f"wire {wire.name!r}: {why}; pack every slot by itself, as for part in x.split(lengths)")
        for bad in (torch.nan, torch.inf):
            other[start] = bad
            if again(other)[start:stop].isfinite().all():
                why = f"{bad} reads as a finite value, so an overflow would be applied"
                raise ValueError(f"wire {wire.name!r}: {why}; let its block read as nan")
    if wire.memory is not None:
        _prove_memory(wire, wire.memory, x.to(dtype), again(x))
    if again(torch.zeros_like(x)).count_nonzero():
        why = "zeros do not read as zeros, and a leaf that the loss does not use is all zeros"
        raise ValueError(f"wire {wire.name!r}: {why}; where a scale is taken, divide by at least a smallest one")


def _prove_memory(wire: Wire, memory: Memory, sent: Tensor, read: Tensor) -> None:
    """Tries what a wire keeps: of the same form, not in place, and nothing of a sum that was read as it was sent."""
    given = [sent, read, torch.zeros_like(sent)]
    before = [x.clone() for x in given]
    kept, none = memory.keep(*given), memory.keep(sent, sent, torch.zeros_like(sent))
    if not isinstance(kept, Tensor) or kept.dtype != sent.dtype or kept.shape != sent.shape:
        have = f"{kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else f"a {type(kept).__name__}"
        what = f"keep gives {have} for {sent.dtype} of shape {tuple(sent.shape)}"
        raise TypeError(f"wire {wire.name!r}: {what}; work value by value, in the dtype that is given")
    if not all(map(torch.equal, given, before)):
        raise ValueError(f"wire {wire.name!r}: keep writes into the values that it is given; return new ones")
    if none.count_nonzero():
        why = "keep remembers something of values that were read as they were sent"
        raise ValueError(f"wire {wire.name!r}: {why}; keep what is left, as sent - read")

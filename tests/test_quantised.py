"""Quantising wires: the error of every value, what is exact, what reads as nan, bytes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funczero as fz
from funczero.comm.wire import prove

WIRES = {
    "int8": lambda block: fz.int8(block),
    "int4": lambda block: fz.int4(block),
    "int8, stochastic": lambda block: fz.int8(block, stochastic=True),
    "int4, stochastic": lambda block: fz.int4(block, stochastic=True),
    "fp8": lambda block: fz.fp8(block),
    "fp8, e5m2": lambda block: fz.fp8(block, "e5m2"),
}
ROTATED = {f"int{bits}, hadamard": bits for bits in (4, 8)}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def values(n, dtype, seed=0, spread=4.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=g, dtype=torch.float64) * torch.exp(spread * torch.rand(n, generator=g))).to(dtype)


def tops(x, lengths, block):
    """The largest magnitude of each value's block, by a plain loop."""
    out = []
    for part in x.double().split(lengths):
        for piece in part.split(block):
            out.append(piece.abs().max().expand(len(piece)))
    return torch.cat(out)


def bound(name, x, top):
    if name.startswith("fp8"):
        return torch.maximum(x.double().abs() * (2**-3 if "e5m2" in name else 2**-4), top * 2**-17)
    return top / ((127 if "int8" in name else 7) * (1 if "stochastic" in name else 2))


@pytest.mark.parametrize("name", WIRES)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=5).map(tuple),
    st.integers(1, 40),
    st.integers(0, 2**30),
    st.sampled_from(DTYPES),
)
def test_every_value_is_within_its_bound(name, lengths, block, seed, dtype):
    wire, x = WIRES[name](block), values(sum(lengths), dtype, seed)
    sent = wire.pack(x, lengths, seed)
    assert sent.nbytes == wire.nbytes(lengths, dtype) and sent.dim() == 1
    wide = torch.promote_types(dtype, torch.float32)
    read, top = wire.unpack(sent, lengths, wide), tops(x, lengths, block)
    assert read.dtype == wide
    assert ((read.double() - x.double()).abs() <= bound(name, x, top) * (1 + 1e-5)).all()
    largest = x.double().abs() == top
    assert torch.equal(read.double()[largest], x.double()[largest])


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, -3.3, 1e-40, 6e-8, 0.0, 65504.0])
def test_a_constant_block_is_exact(name, dtype, value):
    x = torch.full((50,), value).to(dtype)
    wire = WIRES[name](16)
    assert torch.equal(wire.unpack(wire.pack(x, (33, 17), 1), (33, 17), dtype), x)


@pytest.mark.parametrize("width", [4, 16, 32])
@pytest.mark.parametrize("make", [fz.int8, fz.int4])
def test_a_rotation_keeps_constants_and_sums_of_squares(make, width):
    wire, x = make(64, hadamard=width), torch.full((131,), -3.3)
    assert torch.equal(wire.unpack(wire.pack(x, (99, 32), 0), (99, 32), torch.float32), x)
    y, lengths = values(256, torch.float32, spread=0.0), (256,)
    y[7] = 60.0  # one large value costs its block its precision, unless it is spread
    error = lambda w: (w.unpack(w.pack(y, lengths, 0), lengths, torch.float32) - y).square().sum()
    assert error(make(64, hadamard=width)) < error(make(64))


def test_stochastic_rounding_has_no_bias_and_keeps_grid_points():
    x, wire = torch.tensor([7.0, 0.3, -1.6, 3.0]), fz.int4(4, stochastic=True)
    reads = torch.stack([wire.unpack(wire.pack(x, (4,), k), (4,), torch.float32) for k in range(4000)])
    assert torch.equal(reads[:, 0], torch.full((4000,), 7.0)) and torch.equal(reads[:, 3], torch.full((4000,), 3.0))
    assert (reads.mean(0) - x).abs().max() < 0.04 and reads[:, 1].unique().tolist() == [0.0, 1.0]
    assert torch.equal(wire.pack(x, (4,), 5), wire.pack(x, (4,), 5))


@pytest.mark.parametrize("name", [*WIRES, *ROTATED])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reads_as_nan_in_its_block_alone(name, bad):
    wire = WIRES[name](16) if name in WIRES else getattr(fz, f"int{ROTATED[name]}")(16, hadamard=16)
    x = values(64, torch.float32)
    x[20] = bad
    read = wire.unpack(wire.pack(x, (32, 32), 0), (32, 32), torch.float32)
    assert read[16:32].isnan().all() and read[:16].isfinite().all() and read[32:].isfinite().all()


@pytest.mark.parametrize("name", [*WIRES, *ROTATED])
@pytest.mark.parametrize("born", DTYPES)
def test_wires_keep_their_laws(name, born):
    wire = WIRES[name](16) if name in WIRES else getattr(fz, f"int{ROTATED[name]}")(32, hadamard=16)
    wide = torch.promote_types(born, torch.float32)
    for pair in ((born, born), (born, wide), (wide, wide)):
        prove(wire, *pair, torch.device("cpu"))


def test_bytes_are_the_codes_and_a_scale_a_block():
    assert fz.int8(2048).nbytes((4096, 16), torch.float32) == 4112 + 3 * 4
    assert fz.int4(512).nbytes((1024, 15), torch.bfloat16) == 520 + 3 * 2
    assert fz.fp8(128).nbytes((256,), torch.float16) == 256 + 2 * 2
    assert fz.int4(512, hadamard=16).nbytes((1024,), torch.bfloat16) == 512 + 2 * 4
    assert fz.int8(64).nbytes((), torch.float32) == 0 == fz.int8(64).pack(torch.empty(0), (), 0).numel()


BAD = {
    "int8: block=0 is no number of values; write an int of at least 1, as 512": lambda: fz.int8(0),
    "int4: block=2.5 is no number of values": lambda: fz.int4(2.5),
    "int4: block=True is no number of values": lambda: fz.int4(True),
    "fp8: block=-1 is no number of values": lambda: fz.fp8(-1),
    "fp8: form='e3m4' does not exist; write one of ['e4m3', 'e5m2']": lambda: fz.fp8(form="e3m4"),
    "int4: hadamard=12 does not fit; groups are powers of two that divide a block of 512": lambda: fz.int4(hadamard=12),
    "int8: hadamard=64 does not fit; groups are powers of two that divide a block of 96": lambda: fz.int8(
        96, hadamard=64
    ),
}


@pytest.mark.parametrize("why", BAD)
def test_a_wire_that_does_not_exist_is_refused(why):
    with pytest.raises(ValueError) as e:
        BAD[why]()
    assert why in str(e.value)

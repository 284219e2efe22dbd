"""comm/words.py: any values as int64 words and back, bit for bit."""

from __future__ import annotations

import pytest
import torch

from funczero.comm.words import count, values, words

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("shape", [(), (3,), (5, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(dtype, shape, rows):
    x = (torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows)) * 9).to(dtype)
    packed = words(x)
    assert packed.shape == (rows, count(shape, dtype)) and packed.dtype == torch.int64
    back = values(packed, shape, dtype)
    assert back.shape == x.shape and back.dtype == dtype and torch.equal(back, x)


def test_what_is_no_number_keeps_its_bits_and_a_sum_with_zeros_too():
    x = torch.tensor([[float("nan"), float("inf"), -0.0]]).repeat(2, 1)
    x[1] = torch.tensor([-1e-45, -3.0, 5.0])
    mine = torch.stack(
        [torch.cat([words(x[:1]), torch.zeros(1, 2, dtype=torch.int64)]), torch.zeros(2, 2, dtype=torch.int64)]
    )
    mine[1, 1] = words(x)[1]
    back = values(mine.sum(0), (3,), x.dtype)
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))


def test_memory_that_is_not_contiguous():
    x = torch.arange(12.0).view(3, 4).T
    assert torch.equal(values(words(x), (3,), x.dtype), x)

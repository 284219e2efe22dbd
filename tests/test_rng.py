"""Keys as values."""

from __future__ import annotations

import pytest
import torch

from funczero import rng


def test_a_key_is_63_bits_and_depends_on_every_use():
    keys = [
        rng.fold(0),
        rng.fold(1),
        rng.fold(0, 0),
        rng.fold(0, 1),
        rng.fold(0, "1"),
        rng.fold(0, 0, 1),
        rng.fold(0, 1, 0),
        rng.fold(rng.fold(0, 1), 0),
    ]
    assert len(set(keys)) == len(keys) and all(0 <= k < 2**63 for k in keys)
    assert rng.fold(7, 3, "dropout") == rng.fold(7, 3, "dropout") == 2537153570302045991


def test_dropout_is_a_function_of_its_key():
    x = torch.ones(1000)
    a, b, c = (rng.dropout(x, 0.25, k) for k in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert set(a.tolist()) == {0.0, torch.tensor(1 / 0.75).item()} and abs(a.mean() - 1) < 0.1
    assert rng.dropout(x, 0.0, 1) is x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_does_not_depend_on_the_dtype(dtype):
    assert torch.equal(rng.dropout(torch.ones(64, dtype=dtype), 0.5, 3) > 0, rng.dropout(torch.ones(64), 0.5, 3) > 0)


def test_dropout_passes_gradients_through_what_it_kept():
    x = torch.ones(50, requires_grad=True)
    y = rng.dropout(x, 0.5, 0)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_normal_values_are_scaled_and_repeatable():
    x = rng.normal(5, (200, 50), std=0.1, dtype=torch.float64)
    assert (
        torch.equal(x, rng.normal(5, (200, 50), std=0.1, dtype=torch.float64))
        and abs(x.std() - 0.1) < 2e-3
        and abs(x.mean()) < 2e-3
    )


def test_torchs_own_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    x = rng.dropout(torch.ones(9), 0.5, 1), rng.normal(1, (3,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(
        torch.equal(a, b) for a, b in zip(x, (rng.dropout(torch.ones(9), 0.5, 1), rng.normal(1, (3,))), strict=True)
    )

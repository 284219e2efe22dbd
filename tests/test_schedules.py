"""Learning rates as functions of applied updates."""
from __future__ import annotations

import math

import pytest
import torch

from funczero import schedules


def at(f, *updates):
    return [f(torch.tensor(u)).item() for u in updates]


def test_a_constant_is_constant():
    assert at(schedules.constant(0.3), 0, 1, 10**9) == [0.3] * 3


@pytest.mark.parametrize(("peak", "warmup", "total", "end"), [(1.0, 10, 110, 0.0), (3e-4, 0, 7, 1e-5), (1.0, 5, 5, 0.5), (2.0, 0, 0, 1.0)])
def test_warmup_cosine_is_its_formula(peak, warmup, total, end):
    def formula(u):
        if u < warmup:
            return peak * u / warmup
        done = min((u - warmup) / max(total - warmup, 1), 1.0)
        return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2

    points = range(0, total + 20)
    assert at(schedules.warmup_cosine(peak, warmup, total, end), *points) == pytest.approx([formula(u) for u in points], rel=1e-12, abs=1e-15)


def test_the_last_update_has_the_last_value():
    f = schedules.warmup_cosine(1.0, 2, 12, end=0.25)
    assert at(f, 2, 12, 13, 10**6) == [1.0, 0.25, 0.25, 0.25]


def test_values_are_float64_on_the_device_of_the_count():
    for f in (schedules.constant(1), schedules.warmup_cosine(1, 1, 2)):
        y = f(torch.tensor(3))
        assert y.dtype == torch.float64 and y.dim() == 0

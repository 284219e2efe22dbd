"""What a function holds beside its arguments."""

from __future__ import annotations

from functools import partial

import torch
from torch.func import grad, vmap

from funczero.core.held import differentiated, held_by, transformed

RATE, TABLE, OTHER = torch.tensor(0.5), {"rate": torch.tensor(0.25)}, torch.tensor(2.0)


def reads(x):
    return x * RATE + TABLE["rate"] + x.OTHER


class Object:
    def __init__(self, rate):
        self.rates = [rate]

    def method(self, x):
        return x * self.rates[0]

    def __call__(self, x):
        return self.method(x)


def values(fn, owned=True):
    return [x.item() for x in held_by(fn, owned) if isinstance(x, torch.Tensor)]


def test_closures_partials_objects_and_globals():
    rate = torch.tensor(3.0)
    inner = lambda x: x * rate
    outer = lambda x: inner(x)
    assert values(inner, False) == values(outer, False) == [3.0]
    assert values(partial(lambda x, by: x * by, by=rate), False) == [3.0]
    assert values(Object(rate)) == values(Object(rate).method) == [3.0] and not values(Object(rate), False)
    assert sorted(values(reads)) == [0.25, 0.5] and not values(reads, False)  # an attribute's name is no global
    assert values(lambda x: Object(x).method(x)) == []


def test_what_is_differentiated():
    assert differentiated(OTHER.clone().requires_grad_()) and not differentiated(OTHER) and not transformed(OTHER)
    seen = []
    grad(lambda x: (seen.append(transformed(x)), x)[1])(OTHER)
    vmap(lambda x: (seen.append(transformed(x)), x)[1])(OTHER[None])
    assert seen == [True, True]


def test_a_name_that_is_bound_later_is_nothing_yet():
    early = lambda x: x * later
    assert values(early, False) == []
    later = torch.tensor(2.0)
    assert values(early, False) == [2.0]

"""The types: what a layout says of itself, and the order of fields that people unpack."""

from __future__ import annotations

import pytest
import torch

from funczero.core.optimizer import GradientTransformation
from funczero.core.types import ChainError, Layout, Metrics, Seed, Sum, TrainState, Updated, Value

LAYOUTS = {
    "sum": Layout(),
    "sum, unreduced over ['node', 'local']": Layout(batch=("node", "local"), unreduced=frozenset({"local", "node"})),
    "sum, unreduced over ['local'], sharded over ['node'], of 8 micro-batches": Layout(
        batch=("node", "local"),
        unreduced=frozenset({"local"}),
        sharded=("node",),
        order=(("accumulate", 4), ("node", 2)),
    ),
    "mean, sharded over ['data']": Layout(batch=("data",), sharded=("data",), rest=("data",), phase="value"),
    "new parameters": Layout(batch=("data",), phase="updated"),
}


@pytest.mark.parametrize("words", LAYOUTS)
def test_a_layout_describes_itself(words):
    assert LAYOUTS[words].describe() == words


def test_the_stride_is_the_micro_batches_summed():
    assert Layout().stride == 1 and Layout(order=(("accumulate", 4), ("data", 3), ("accumulate", 2))).stride == 24


def test_layouts_are_values():
    assert Layout(batch=("data",)) == Layout(batch=("data",)) != Layout() and hash(Layout()) == hash(Layout())
    with pytest.raises(AttributeError):
        Layout().phase = "value"  # type: ignore[misc]


def test_fields_keep_their_order():
    assert Sum._fields == ("loss", "weight", "aux", "grads", "bad", "moved", "used", "tops", "high", "micros")
    assert Value._fields[:4] == Sum._fields[:4] and Updated._fields[:4] == ("loss", "weight", "aux", "params")
    assert Seed._fields[:4] == ("cotangent", "key", "index", "look")
    assert TrainState._fields == ("params", "views", "chain", "step", "updates", "key")
    assert Metrics._fields == ("loss", "weight", "grad_norm", "ok", "empty", "scale", "lr", "updates", "aux")
    assert GradientTransformation._fields[:2] == ("init", "update")


def test_a_chain_error_is_a_type_error():
    with pytest.raises(TypeError):
        raise ChainError("clip: ...")


def test_a_sum_has_no_value_and_new_parameters_have_no_gradient():
    total = Sum(torch.zeros(1), torch.ones(1), None, None)
    assert (
        total.bad is None and not {"factor", "norm", "ok", "logs"} & set(Sum._fields) and "grads" not in Updated._fields
    )
    assert [Layout(phase=p).mean for p in ("sum", "value", "updated")] == [False, True, True]
    assert [Layout(phase=p).applied for p in ("sum", "value", "updated")] == [False, False, True]

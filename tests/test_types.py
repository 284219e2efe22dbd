"""The types: what a layout says of itself, and the order of fields that people unpack."""
from __future__ import annotations

import pytest
import torch

from funczero.core.types import ChainError, GradientTransformation, Layout, Metrics, Out, Seed, TrainState

LAYOUTS = {
    "sum": Layout(),
    "sum, unreduced over ['node', 'local']": Layout(batch=("node", "local"), unreduced=frozenset({"local", "node"})),
    "sum, unreduced over ['local'], sharded over ['node'], of 8 micro-batches": Layout(
        batch=("node", "local"), unreduced=frozenset({"local"}), sharded=("node",), order=(("accumulate", 4), ("node", 2))
    ),
    "mean, sharded over ['data']": Layout(batch=("data",), sharded=("data",), rest=("data",), mean=True),
    "new parameters": Layout(batch=("data",), mean=True, applied=True),
}


@pytest.mark.parametrize("words", LAYOUTS)
def test_a_layout_describes_itself(words):
    assert LAYOUTS[words].describe() == words


def test_the_stride_is_the_micro_batches_summed():
    assert Layout().stride == 1 and Layout(order=(("accumulate", 4), ("data", 3), ("accumulate", 2))).stride == 24


def test_layouts_are_values():
    assert Layout(batch=("data",)) == Layout(batch=("data",)) != Layout() and hash(Layout()) == hash(Layout())
    with pytest.raises(AttributeError):
        Layout().mean = True  # type: ignore[misc]


def test_fields_keep_their_order():
    assert Out._fields[:4] == ("loss", "weight", "aux", "grads")
    assert Seed._fields == ("cotangent", "key", "index", "look")
    assert TrainState._fields == ("params", "views", "chain", "step", "updates", "key")
    assert Metrics._fields == ("loss", "weight", "grad_norm", "ok", "empty", "scale", "lr", "updates", "aux")
    assert GradientTransformation._fields[:2] == ("init", "update")


def test_a_chain_error_is_a_type_error():
    with pytest.raises(TypeError):
        raise ChainError("clip: ...")


def test_an_out_before_the_mean_has_no_value():
    out = Out(torch.zeros(1), torch.ones(1), None, None)
    assert (out.factor, out.norm, out.ok, out.bad, out.logs) == (None, None, None, None, {})

"""A policy is one readable string."""

from __future__ import annotations

import pytest
import torch

from funczero import Policy

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (None, (f32, f32, f32)),
        ("bf16", (bf16, bf16, bf16)),
        ("float64", (f64, f64, f64)),
        ("compute=bfloat16", (f32, bf16, f32)),
        ("params=float32, compute=fp16 ,accumulate=f32", (f32, f16, f32)),
        ("accumulate=f64,params=bf16", (bf16, f32, f64)),
        (Policy(bf16), (bf16, f32, f32)),
    ],
)
def test_a_policy_is_read(text, want):
    assert tuple(Policy.parse(text)) == want


def test_a_policy_is_written_as_it_is_read():
    for dtypes in [(f32, bf16, f32), (f64, f64, f64), (bf16, f16, f32)]:
        assert Policy.parse(str(Policy(*dtypes))) == Policy(*dtypes)
    assert str(Policy.parse("compute=bf16")) == "params=float32,compute=bfloat16,accumulate=float32"


@pytest.mark.parametrize("text", ["", "int8", "compute=int8", "speed=fast", "float", "compute="])
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(ValueError, match="^policy: "):
        Policy.parse(text)

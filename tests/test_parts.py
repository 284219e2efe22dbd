"""gradients/parts.py: attention inside a loss of parts has derivatives of any order, and the process keeps its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp

import funczero as fz
from funczero import P
from funczero.gradients.parts import Derivable
from funczero.testing import simulate


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEADS = {
    "plain": ((2, 4, 5, 8), {}),
    "causal": ((2, 4, 5, 8), {"is_causal": True}),
    "scaled": ((2, 4, 5, 8), {"scale": 0.3}),
    "masked": ((2, 4, 5, 8), {"attn_mask": torch.ones(5, 5).tril().bool()}),
    "a row of nothing": ((2, 4, 5, 8), {"attn_mask": torch.ones(5, 5).triu(1).bool()}),
    "added": ((2, 4, 5, 8), {"attn_mask": draw(5, 5, seed=3)}),
    "grouped": ((2, 2, 5, 8), {"enable_gqa": True}),
}


@pytest.mark.parametrize("name", HEADS)
def test_attention_is_torchs_and_has_second_derivatives(name):
    shape, options = HEADS[name]
    q, k, v = draw(2, 4, 5, 8), draw(*shape, seed=1), draw(*shape, seed=2)
    want = F.scaled_dot_product_attention(q, k, v, **options)
    square = lambda q: F.scaled_dot_product_attention(q, k, v, **options).square().sum()
    with Derivable():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), want, rtol=1e-12, atol=1e-14)
        along = jvp(grad(square), (q,), (q,))[1]
    h = 1e-5
    differences = (grad(square)(q * (1 + h)) - grad(square)(q * (1 - h))) / (2 * h)
    torch.testing.assert_close(along, differences, rtol=1e-6, atol=1e-7)


def test_every_argument_by_place_and_by_name():
    q, k, v = (draw(1, 2, 3, 4, seed=i) for i in range(3))
    with Derivable():
        a = F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        b = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
    assert torch.equal(a, b) and hessian(lambda x: x.square().sum())(torch.ones(1)).item() == 2.0


def switches():
    """torch's choice of attention kernels, which belongs to the process."""
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math")]


def attending(p, b):
    x = fz.layers(lambda p, x: F.scaled_dot_product_attention(x @ p["w"], x, x), p["blocks"], b)
    return x.square().sum(), torch.tensor(float(len(b)), dtype=torch.float64)


def trained():
    """Two updates of a loss with attention inside units, in this form."""
    source = fz.value_and_grad(attending, batch=P("data"), units=("blocks",), higher_order=True)
    step = fz.train_step(*fz.zero(source, fz.sgd(0.01), stage=3), mesh={"data": 2}, policy="float64")
    state = step.init({"blocks": [{"w": draw(4, 4, seed=i)} for i in range(2)]})
    for i in range(2):
        state, _ = step(state, step.local_rows(draw(4, 2, 3, 4, seed=i)))
    return step.params(state)


def test_threads_that_take_turns_leave_the_processs_kernels_alone():
    """A switch of the whole process was left off by ranks that are threads: every later attention had other bits."""
    before = switches()
    for _ in range(5):
        simulate({"data": 2})(trained)
    assert switches() == before == [True] * 3

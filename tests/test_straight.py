"""core/straight.py: values of one function with the derivatives of another, under every composition of torch.func."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from funczero.core import tree
from funczero.core.straight import root, straight


def formula(t, n):
    """A tree out of a tree, with integers and what is no tensor in it."""
    return {"a": torch.sin(t["x"]) @ t["w"], "b": (t["x"] ** 3).sum(), "n": n + 1}, None, t["w"]


def measured(fn):
    def loss(t):
        out, _, w = fn(t, torch.arange(3))
        assert out["n"].dtype == torch.int64
        return (out["a"] ** 2).sum() * out["b"] + (w**2).sum()

    return loss


def inputs(seed):
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(3, 4, generator=g).double(), "w": torch.randn(4, 2, generator=g).double()}


V = inputs(1)
ALONG = {
    "grad": lambda f: grad(f),
    "jvp": lambda f: lambda t: jvp(f, (t,), (V,)),
    "forward over reverse": lambda f: lambda t: jvp(grad(f), (t,), (V,)),
    "reverse over forward": lambda f: grad(lambda t: jvp(f, (t,), (V,))[1]),
    "reverse over reverse": lambda f: grad(lambda t: sum((a * V[k]).sum() for k, a in grad(f)(t).items())),
    "hessian": lambda f: hessian(f),
    "jacrev": lambda f: jacrev(grad(f)),
    "third": lambda f: lambda t: jvp(lambda t: jvp(grad(f), (t,), (V,))[1], (t,), (V,)),
    "batched": lambda f: lambda t: vmap(lambda s: grad(f)({k: x * s for k, x in t.items()}))(torch.ones(2).double()),
    "through a batch": lambda f: grad(
        lambda t: vmap(lambda s: f({k: x * s for k, x in t.items()}))(torch.ones(2).double()).sum()
    ),
}
WRAPPED = {
    "once": lambda t, n: straight(formula, formula, t, n),
    "nested": lambda t, n: straight(
        lambda t, n: straight(formula, formula, t, n), lambda t, n: straight(formula, formula, t, n), t, n
    ),
}


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_derivatives_of_any_order_are_the_formulas(along, wrapped):
    want = ALONG[along](measured(formula))(inputs(0))
    got = ALONG[along](measured(WRAPPED[wrapped]))(inputs(0))
    for a, b in zip(tree.leaves(want), tree.leaves(got), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_plain_autograd_and_bare_dual_levels(wrapped):
    def second(fn):
        t = {k: x.clone().requires_grad_() for k, x in inputs(0).items()}
        first = torch.autograd.grad(measured(fn)(t), list(t.values()), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), list(t.values()))

    def dual(fn):
        with forward_ad.dual_level():
            t = {k: forward_ad.make_dual(x, V[k]) for k, x in inputs(0).items()}
            return forward_ad.unpack_dual(measured(fn)(t)).tangent

    for a, b in zip(second(formula), second(WRAPPED[wrapped]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    if wrapped == "once":
        torch.testing.assert_close(dual(WRAPPED[wrapped]), dual(formula), rtol=1e-12, atol=1e-12)


def test_values_are_the_values_functions():
    rounded = lambda x: straight(torch.round, lambda x: x * 1.0, x)
    x = torch.tensor([1.7, -0.2])
    assert rounded(x).tolist() == [2.0, -0.0]
    assert grad(lambda x: (rounded(x) ** 2).sum())(x).tolist() == [4.0, -0.0]
    assert vmap(rounded)(x[:, None]).tolist() == [[1.7000000476837158], [-0.20000000298023224]]  # the formula's


def test_only_inputs_are_kept():
    made = []

    def large(x):
        inner = torch.exp(x)
        made.append(weakref.ref(inner))
        return (inner**2).sum()

    x = torch.ones(8, requires_grad=True)
    out = straight(large, large, x)
    gc.collect()
    assert made[0]() is None and out.requires_grad


def test_an_output_may_be_an_input():
    same = lambda x, y: (x, x, y)
    (a, b, c), pull = torch.func.vjp(lambda x, y: straight(same, same, x, y), torch.ones(2), torch.ones(1))
    assert [g.tolist() for g in pull((a, b, c))] == [[2.0, 2.0], [1.0]]


def test_the_root_of_nought_and_of_nan():
    x = torch.tensor([0.0, 4.0, float("nan")])
    assert root(x)[:2].tolist() == [0.0, 2.0] and root(x)[2].isnan()
    assert grad(lambda x: root(x).sum())(x[:2]).tolist() == [0.0, 0.25]
    assert hessian(lambda x: root(x).sum())(x[:1]).tolist() == [[0.0]]


X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
T = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)


def twice(value, formula=None):
    return lambda *xs: straight(value, formula or value, *xs)


def test_complex_values_have_derivatives():
    z = torch.complex(X, T)
    turned = lambda z: (z * z.conj() + z.exp() * 1j) * z.real
    plain = lambda fn: lambda z: fn(z).abs().square().sum()
    want, got = grad(plain(turned))(z), grad(plain(twice(turned)))(z)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(jvp(twice(turned), (z,), (z,))[1], jvp(turned, (z,), (z,))[1], rtol=1e-13, atol=0)
    of_real = lambda x: twice(lambda x: torch.complex(x, x * x))(x).abs().sum()
    torch.testing.assert_close(grad(of_real)(X), grad(lambda x: torch.complex(x, x * x).abs().sum())(X))


def test_outputs_that_are_views_in_a_bare_forward_mode():
    """What torch.func never sees: a custom function's views of its own values, with tangents."""
    plain = lambda x: (lambda y: (y[0], y[1:], y))(torch.stack([x.sin(), x.cos(), x * x]))
    bits = lambda x: torch.cat([y.flatten() for y in plain(x)[1:]]).view(torch.int64)
    packed = lambda x: (lambda y: (y[6].sum(), y[:6].view(2, 3), y[6:].view(3, 3)))(bits(x).view(torch.float64))
    formula = lambda x: (lambda y: (y[2][0, 0], y[1], y[2]))(plain(x))
    with forward_ad.dual_level():
        found = twice(packed, formula)(forward_ad.make_dual(X, T))
        tangents = [forward_ad.unpack_dual(y).tangent for y in found]
    for t, want in zip(tangents, jvp(formula, (X,), (T,))[1], strict=True):
        torch.testing.assert_close(t, want)


def test_the_derivatives_are_the_formulas_at_every_order_and_batched():
    fn = twice(torch.round, lambda x: x.sin())
    assert torch.equal(fn(X), X.round())
    torch.testing.assert_close(hessian(lambda x: fn(x).sum())(X), torch.diag(-X.sin()))
    third = lambda x: grad(lambda x: grad(lambda x: grad(lambda x: fn(x).sum())(x).sum())(x).sum())(x)
    torch.testing.assert_close(third(X), -X.cos())
    torch.testing.assert_close(vmap(grad(lambda x: fn(x).sum()))(torch.stack([X, T])), torch.stack([X, T]).cos())

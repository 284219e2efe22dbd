"""straight: the values of one function with the derivatives of another, in every mode and nested."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from funczero.core.straight import straight

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

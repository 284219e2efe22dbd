"""comm/adjoint.py: six crossings in three pairs, each the other's transpose, in every mode of torch.func."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import zoo
from torch.func import grad, jvp, vjp, vmap

import funczero as fz
from funczero.comm import adjoint

PAIRS = {"gather_rows": "scatter_rows", "join_rows": "own_rows", "total": "vary"}


def mesh_of(size):
    return fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=0), mesh={"data": size}).live_mesh


def of_squares(fn, g, x):
    """The gradient of <fn(x squared), g>."""
    return vjp(lambda x: fn(x**2), x)[1](g)[0]


def transposed(size):
    """Which crossings are no linear functions with that transpose: in both modes, batched, and twice."""
    mesh, wrong = mesh_of(size), []
    rank = mesh.index("data")
    values = lambda seed, n, own: torch.randn(n, 3, generator=torch.Generator().manual_seed(seed + own * rank)).double()
    fns = {n: partial(getattr(adjoint, n), axis="data", mesh=mesh) for pair in PAIRS.items() for n in pair}
    for name, back in [*PAIRS.items(), *((b, a) for a, b in PAIRS.items())]:
        fn, many = fns[name], name in ("scatter_rows", "own_rows")
        x = values(1, 2 * size if many else 2, name not in ("own_rows", "vary"))
        y = fn(x)
        g = values(2, len(y), name not in ("join_rows", "total"))
        out, pull = vjp(fn, x)
        checks = {
            "transpose": torch.equal(pull(g)[0], fns[back](g)),
            "forward": torch.equal(jvp(fn, (x,), (x * 2,))[1], fn(x * 2)),
            "batched": torch.equal(vmap(fn, in_dims=1, out_dims=1)(torch.stack([x, -x], 1))[:, 0], y),
            "batch last": torch.equal(vmap(fn, in_dims=2, out_dims=2)(torch.stack([x, -x], 2))[..., 1], fn(-x)),
            "twice": torch.allclose(jvp(partial(of_squares, fn, g), (x,), (x,))[1], 2 * x * fns[back](g)),
        }
        wrong += [f"{name}: {what}" for what, right in checks.items() if not right]
    return wrong


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_is_the_transpose_of_the_other(run_world, size):
    for wrong in run_world(size, transposed, size):
        assert not wrong, wrong


def narrow():
    """bfloat16 parts of float32 masters: what travels, and in what it is added."""
    mesh = mesh_of(2)
    x = torch.full((2,), 1.0 + mesh.index("data") * 2**-9)
    with fz.count_bytes(mesh) as sent:
        out, pull = vjp(lambda x: adjoint.gather_rows(x, "data", mesh, torch.bfloat16), x)
        back = pull(torch.full((4,), 1.0 + 2**-7, dtype=torch.bfloat16))[0]
        sums = adjoint.total(
            torch.full((8,), 2**-9, dtype=torch.bfloat16) + mesh.index("data"), "data", mesh, torch.float32
        )
    return out.dtype, back, sums[0].item(), {k[2] for k in sent}


def test_what_travels_narrow_is_added_wide(run_world):
    for born, back, sums, forms in run_world(2, narrow):
        assert born == torch.bfloat16 and back.dtype == torch.float32 and back[0].item() == 2 * (1 + 2**-7)
        assert sums == 1 + 2**-9 and "bfloat16" in forms


def test_rows_that_do_not_divide_are_refused():
    mesh = mesh_of(1)
    two = mesh._replace(axes={"data": mesh.axes["data"]._replace(size=2)})
    for fn in (adjoint.scatter_rows, adjoint.own_rows):
        with pytest.raises(ValueError, match="dim 0 of shape \\(3,\\) does not divide among 2 ranks; pad it first"):
            fn(torch.zeros(3), "data", two)


def pairs():
    """total and vary are each other's transpose, in reverse and in forward mode, batched and nested."""
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=0), mesh={"data": 2})
    mesh, rank = step.live_mesh, step.mesh.index("data")
    x = torch.arange(3, dtype=torch.float64) + 1 + rank
    f = lambda x: (adjoint.total(x**2, "data", mesh) * torch.arange(3).double()).sum()
    same = torch.arange(3, dtype=torch.float64)
    h = lambda s: adjoint.total((adjoint.vary(s, "data", mesh) * x).sum(), "data", mesh)
    return {
        "total": grad(f)(x).tolist() == (2 * x * torch.arange(3)).tolist(),
        "vary": grad(h)(same).tolist() == [3.0, 5.0, 7.0],
        "forward": jvp(h, (same,), (torch.ones(3).double(),))[1].item() == 15.0,
        "batched": vmap(grad(h))(torch.stack([same, same])).tolist() == [[3.0, 5.0, 7.0]] * 2,
        "second": (
            grad(lambda s: grad(lambda s: h(s) ** 3)(s).sum())(same)[0].item()
            == pytest.approx(6 * h(same).item() * 15 * 3)
        ),
    }


def test_total_and_vary_are_each_others_transpose(run_world):
    for found in run_world(2, pairs):
        assert all(found.values()), found

"""What a user may add in a few lines of their own: it runs at every stage on two ranks, and gives what one rank gives.

Each addition is a function of at most fifteen lines; `test_each_is_short` counts them.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import torch
import zoo
from torch.utils._pytree import tree_map

import funczero as fz
from funczero import P
from funczero.testing import tree_hash
from funczero.transforms.mean import pointwise


def wire():
    """Float16 with the sign and size of each slot's largest value in front, so that small gradients do not vanish."""

    def pack(x, lengths, key):
        tops = torch.stack([part.float().abs().amax().clamp(min=2**-14) for part in x.split(lengths)]).half()
        return torch.cat([tops, *((p / t).half() for p, t in zip(x.float().split(lengths), tops.float()))])

    def unpack(sent, lengths, dtype):
        tops, rest = sent[: len(lengths)].float(), sent[len(lengths) :]
        return torch.cat([p.float() * t for p, t in zip(rest.split(lengths), tops)]).to(dtype)

    return fz.Wire("half by slot", pack, unpack, lambda lengths, dtype: 2 * (len(lengths) + sum(lengths)))


def transform(limit=0.5):
    """Gradients are squashed, smoothly, into [-limit, limit]."""
    return pointwise(f"squash({limit:g})", lambda grads, factor: limit * torch.tanh(grads * factor / limit))


class Signed(NamedTuple):
    """What the optimizer below keeps."""

    momentum: object


def optimizer(lr=1e-3, decay=0.9):
    """Steps of one size along the sign of a running mean (Bernstein et al., arXiv 1802.04434)."""

    def update(grads, state, params):
        mean = tree_map(lambda m, g: decay * m + (1 - decay) * g, state.momentum, grads)
        return tree_map(lambda m: -lr * m.sign(), mean), Signed(mean)

    init = lambda params: Signed(tree_map(torch.zeros_like, params))
    return fz.GradientTransformation(init, update, name="signed", elementwise=True)


def partition():
    """One optimizer for what lies in blocks, another for the rest."""
    return fz.partition([("blocks", fz.adamw(1e-2)), ("", optimizer())])


def rules(path, shape):
    """The longest dim of every leaf is cut, and vectors stay whole."""
    if len(shape) < 2:
        return P()
    longest = max(range(len(shape)), key=lambda d: shape[d])
    return P(*("data" if d == longest else None for d in range(len(shape))))


def chain(what, stage, k):
    """A chain with one thing of a user's own in it, over k micro-batches a rank."""
    right = {
        "transform": (transform(), fz.adamw(1e-2)),
        "optimizer": (fz.clip_by_global_norm(1.0), optimizer()),
        "partition": (fz.clip_by_global_norm(1.0), partition()),
    }.get(what, (fz.clip_by_global_norm(1.0), fz.adamw(1e-2)))
    if what != "rules" or stage == 0:
        return fz.zero(
            zoo.source(), *right, stage=stage, accumulate=k, **({"scatter": wire()} if what == "wire" else {})
        )
    parts = [zoo.source(), fz.accumulate(k), *right]
    outside = 3 - stage
    return (*parts[:outside], fz.shard("data", *parts[outside:], rules=rules))


def trained(what, stage, size):
    """A hash of masters and metrics. A wire rounds once a sum, so that its runs take one micro-batch a rank."""
    micros = 2 if what == "wire" else 4
    masters, log, *_ = zoo.train(chain(what, stage, micros // size), {"data": size}, updates=3, micros=micros)
    assert all(m.ok for m in log)
    return tree_hash((masters, log))


OWN = {"wire": wire, "transform": transform, "optimizer": optimizer, "partition": partition, "rules": rules}


TRIED = [
    pytest.param(what, stage, marks=() if stage in (3, i % 3) else pytest.mark.slow)
    for i, what in enumerate(OWN)
    for stage in range(4)
]


@pytest.mark.parametrize(("what", "stage"), TRIED)
def test_what_a_user_adds_runs_everywhere(run_world, what, stage):
    """The same bits at every stage; and, but for a wire that rounds where one rank sends nothing, those of one rank."""
    found = zoo.everywhere(run_world, 2, trained, what, stage, 2)
    want = zoo.everywhere(run_world, 2, trained, what, 0, 2) if what == "wire" else trained(what, stage, 1)
    assert found == want


@pytest.mark.parametrize("what", OWN)
def test_each_is_short(what):
    assert len(inspect.getsource(OWN[what]).splitlines()) <= 15

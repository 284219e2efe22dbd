"""States by name, whole, without a collective: each rank's parts, joined and compared where ranks hold the same."""

from __future__ import annotations

import torch
import zoo

import funczero as fz
from funczero.checkpoint.names import named
from funczero.testing import tree_hash


def abstract(dtype=torch.float32):
    """The zoo's parameters without values, tied where they are tied."""
    seen = {}
    return fz.tree.map(lambda x: seen.setdefault(id(x), x.to("meta")), zoo.params(dtype))


def parts(state):
    """This rank's part of every leaf: name -> (global shape, start, values)."""
    return {name: (p.shape, p.start, p.value.clone()) for name, p in named(state).parts.items()}


def joined(by_rank):
    """Whole leaves from the parts of all ranks."""
    out = {}
    for name, (shape, _, first) in by_rank[0].items():
        whole, seen = torch.zeros(shape, dtype=first.dtype), torch.zeros(shape, dtype=torch.bool)
        for mine in by_rank:
            _, start, x = mine[name]
            cut = tuple(slice(a, a + n) for a, n in zip(start, x.shape, strict=True))
            held = seen[cut]
            assert tree_hash(whole[cut][held]) == tree_hash(x[held]), name
            whole[cut], seen[cut] = x, True
        assert seen.all(), name
        out[name] = whole
    return out


def same(a, b):
    """The names whose bits differ."""
    assert list(a) == list(b)
    return [n for n in a if tree_hash(a[n]) != tree_hash(b[n])]


def make(chain, size, k=None, policy=None, **kw):
    """The zoo's step of this name: "3 [grad acc", or "hpZ" on {"node": 2, "local": size // 2}."""
    k = k or max(1, zoo.MICROS // size)
    nested = chain in zoo.nested_chains(zoo.source(("node", "local")), 1, zoo.tx())
    axes = ("node", "local") if nested else ("data",)
    table = (zoo.nested_chains if nested else zoo.flat_chains)(zoo.source(axes), k, zoo.tx(scale=True))
    mesh = {"node": 2, "local": size // 2} if nested else {"data": size}
    return fz.train_step(*table[chain][0], mesh=mesh, policy=policy, **kw)


def train(step, state, start, stop):
    """Updates of the zoo's run."""
    for t in range(start, stop):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    return state


def tiny(**params):
    """A step and a state of these parameters."""
    step = fz.train_step(
        fz.value_and_grad(lambda p, b: (sum(x.sum() for x in fz.tree.leaves(p)) * b.sum(), b.sum())), fz.adamw(0.1)
    )
    return step, step.init(params)

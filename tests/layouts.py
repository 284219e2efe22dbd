"""Structures and coordinates for tests of the layout."""

from __future__ import annotations

from math import prod

import hypothesis.strategies as st
import torch

from funczero.layout.lazy import lazy

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
CPU = torch.device("cpu")
SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)
MESHES = st.lists(st.integers(1, 4), max_size=2)


def structure(params, units=(), rules=None, frozen=lambda path: False):
    return lazy(params, units, rules or {}, frozen, CPU)


def numbered(shapes):
    """Leaves whose elements are all different."""
    start = [sum(prod(s) for s in shapes[:i]) for i in range(len(shapes))]
    return {
        f"p{i}": torch.arange(prod(s), dtype=torch.float64).add(a + 1).view(s)
        for i, (s, a) in enumerate(zip(shapes, start, strict=True))
    }


def ranks(sizes):
    """Coordinates of every rank of a nest of brackets."""
    out = [()]
    for a, n in enumerate(sizes):
        out = [(*c, (f"axis{a}", n, i)) for c in out for i in range(n)]
    return out


def cut(loss, whole):
    """This rank's part of whole leaves by path, as a sharded loss has them; a leading dim of members is kept."""
    out = {}
    for leaf, slot in zip(loss.where.structure.leaves, loss.where.slots, strict=True):
        lead = whole[leaf.path].dim() - len(leaf.shape)
        out[leaf.path] = whole[leaf.path][(slice(None),) * lead + slot.place]
    return out

"""Buffers: a pytree of one tensor a unit, packed from leaves and seen as leaves."""

from __future__ import annotations

import torch
import zoo
from layouts import CPU, structure

from funczero import tree
from funczero.layout.slots import Slots
from funczero.layout.where import Where


def test_packing_takes_none_as_zero_and_frozen_units_as_empty():
    own = structure({"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(4)}, frozen="c".__eq__)
    packed = Slots.pack(Where.whole(own.structure), [None, torch.full((2,), 2.0), None], torch.float32, CPU)
    assert [None if x is None else x.tolist() for x in packed.leaves()] == [[0, 0, 0], [2, 2], None] and packed.buffers[
        1
    ].numel() == 0
    assert tree.leaves(packed.tree())[2].shape == (0,)


def test_a_slots_is_a_pytree_of_buffers():
    x = structure(zoo.params(), ("blocks",)).at((), torch.float32)
    assert all(a is b for a, b in zip(tree.leaves(x), x.buffers, strict=True))
    doubled = tree.map(lambda b: b * 2, x)
    assert isinstance(doubled, Slots) and torch.equal(doubled.tree()["embed"], 2 * zoo.params()["embed"])
    assert x.to(torch.float32) is x and x.to(torch.bfloat16).buffers[0].dtype == torch.bfloat16

"""The static half: which leaves there are, what is opened together, and which dim an axis cuts."""

from __future__ import annotations

import torch
import zoo
from layouts import structure

from funczero import P
from funczero.layout.cut import Rules
from funczero.layout.where import Where


def test_units_hold_what_is_opened_together():
    s = structure(zoo.params(), ("blocks",), frozen=lambda path: path.endswith("/b")).structure
    assert [(u.name, u.seam, u.frozen) for u in s.units] == [
        ("", False, False), *((f"blocks/{i}", True, f) for i in range(3) for f in (False, True)), ("", False, True),
    ]  # fmt: skip
    assert [[s.leaves[i].path for i in m] for m in s.members][1:3] == [["blocks/0/w", "blocks/0/v"], ["blocks/0/b"]]
    assert sum(map(len, s.members)) == len(s.leaves) and s.frozen(s.members[2][0])


def test_a_module_s_names_make_units_too():
    names = {f"layers.{i}.{n}": torch.ones(2) for i in range(2) for n in ("w", "b")} | {"head": torch.ones(1)}
    assert [u.name for u in structure(names, ("layers",)).structure.units] == ["", "layers.0", "layers.1"]


def test_a_rule_finds_a_tied_leaf_by_any_name():
    one = torch.ones(4, 4)
    own = structure({"embed": one, "head": one}, rules={"data": Rules((("head", P(None, "data")),))}).structure
    assert Where(own, (("data", 2, 0),)).spec(0) == P(None, "data")

"""The static half: which leaves there are, what is opened together, and which dim an axis cuts."""
from __future__ import annotations

import pytest
import torch
import zoo
from layouts import structure

from funczero import P
from funczero.layout.structure import Rules
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


AXES = {
    "rows": ({"data": Rules()}, P("data")),
    "columns": ({"data": Rules((("w", P(None, "data")),))}, P(None, "data")),
    "whole by rule": ({"data": Rules((("w", P()),))}, P()),
    "whole by size": ({"data": Rules(threshold=13)}, P()),
    "just large enough": ({"data": Rules(threshold=12)}, P("data")),
    "another leaf's rule": ({"data": Rules((("v", P()),))}, P("data")),
    "the first rule": ({"data": Rules((("w", P()), ("", P("data"))))}, P()),
    "twice the same dim": ({"node": Rules(), "local": Rules()}, P(("node", "local"))),
    "the inner follows the outer": ({"node": Rules((("w", P(None, "node")),)), "local": Rules()}, P(None, ("node", "local"))),
    "the outer binds the inner": ({"node": Rules((("w", P("node", "local")),)), "local": Rules()}, P("node", "local")),
    "the inner by itself": ({"node": Rules(), "local": Rules((("w", P(None, "local")),))}, P("node", "local")),
    "the outer whole, so the inner": ({"node": Rules((("w", P()),)), "local": Rules()}, P()),
}


@pytest.mark.parametrize("name", AXES)
def test_rules_say_which_dim_an_axis_cuts(name):
    rules, want = AXES[name]
    own = structure({"w": torch.ones(4, 3)}, rules=rules).structure
    assert Where(own, tuple((a, 2, 0) for a in rules)).spec(0) == want

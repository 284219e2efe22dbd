"""Specs: which mesh axes split which dim of a tensor, as a value that may be copied and sent."""

from __future__ import annotations

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch.utils._pytree as pytree
from hypothesis import given

from funczero import P

NAMES = st.sampled_from(["data", "node", "local", "x"])
SPECS = st.lists(st.none() | NAMES | st.lists(NAMES, max_size=3).map(tuple), max_size=4).map(lambda dims: P(*dims))


def test_a_spec_names_axes_by_dim():
    spec = P("data", None, ("node", "local"))
    assert repr(spec) == "P('data', None, ('node', 'local'))" and spec == P("data", None, ("node", "local")) != P(
        "data"
    )
    assert spec.axes() == (("data", 0), ("node", 2), ("local", 2)) and P().axes() == ()
    assert len({P("a"), P("a"), P(None, "a")}) == 2


@pytest.mark.parametrize("dims", [(0,), (["data"],), (("data", 1),), (b"data",)])
def test_a_spec_takes_names_only(dims):
    with pytest.raises(
        TypeError, match="is not a mesh axis; write a name, a tuple of names or None for every tensor dim"
    ):
        P(*dims)


@given(SPECS)
def test_axes_are_the_entries_one_by_one_with_their_dims(spec):
    found = spec.axes()
    assert [d for _, d in found] == sorted(d for _, d in found)
    for d, entry in enumerate(spec):
        assert [a for a, at in found if at == d] == [a for a in (entry if isinstance(entry, tuple) else [entry]) if a]


@given(SPECS, st.sampled_from([copy.copy, copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))]))
def test_a_copy_is_the_spec(spec, copied):
    """Dim by dim: two axes of two dims do not become two axes of one."""
    other = copied(spec)
    assert type(other) is P and other == spec and other.axes() == spec.axes() and hash(other) == hash(spec)


@given(SPECS)
def test_what_is_printed_is_what_was_written(spec):
    assert eval(repr(spec), {"P": P}) == spec


def test_a_spec_is_one_leaf_of_a_tree_of_specs():
    tree = {"w": P("data", None), "b": P()}
    assert pytree.tree_leaves(tree) == [P("data", None), P()]

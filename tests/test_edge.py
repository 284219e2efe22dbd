"""How an axis is crossed, as a value: wires by direction, edges of one axis joined, and edges that cannot be."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

import funczero as fz
from funczero.comm.edge import Edge, joined
from funczero.comm.wire import as_born
from funczero.layout.cut import Rules

CPU = torch.device("cpu")
NARROW, BLOCKS = fz.cast("bf16"), fz.int8(16)
WAYS = ("gather", "scatter", "frozen")


def test_joined_edges_keep_the_first_rules_and_every_wire_in_any_order():
    """One edge says the rules and a wire each says another direction: what is joined does not depend on who says it."""
    said = [
        Edge("x", Rules(threshold=7)),
        Edge("x", gather=NARROW),
        Edge("x", scatter=BLOCKS),
        Edge("x", frozen=BLOCKS),
    ]
    whole = Edge("x", Rules(threshold=7), gather=NARROW, scatter=BLOCKS, frozen=BLOCKS)
    for first, *rest in permutations(said):
        (found,) = joined([first, *rest]).values()
        assert found == whole._replace(rules=first.rules)


def test_axes_stay_in_the_order_of_their_first_names():
    found = joined([Edge("b"), Edge("a", gather=NARROW), Edge("b", scatter=BLOCKS)])
    assert list(found.items()) == [("b", Edge("b", scatter=BLOCKS)), ("a", Edge("a", gather=NARROW))]
    assert joined([]) == {}


@pytest.mark.parametrize("way", ["gather", "scatter"])
def test_two_wires_for_one_direction_are_refused(way):
    with pytest.raises(ValueError) as e:
        joined([Edge("x", **{way: NARROW}), Edge("x", **{way: BLOCKS})])
    what = f"the {way} over 'x' has a wire already (cast(bfloat16)), and is given another (int8(16))"
    assert str(e.value) == f"{what}; write one of them"


@pytest.mark.parametrize("gather", [as_born, NARROW], ids=str)
@pytest.mark.parametrize("frozen", [None, as_born, BLOCKS], ids=str)
def test_views_of_leaves_that_do_not_learn_may_travel_otherwise(gather, frozen):
    edge = Edge("x", gather=gather, frozen=frozen)
    assert edge.views_of(False) is gather
    assert edge.views_of(True) is (gather if frozen is None else frozen)


def test_an_edge_is_exact_and_silent_if_and_only_if_no_wire_packs():
    for change in ({}, *({way: as_born} for way in WAYS)):
        assert Edge("x", Rules(), **change).exact and str(Edge("x", **change)) == ""
    for way in WAYS:
        assert not Edge("x", **{way: BLOCKS}).exact and str(Edge("x", **{way: BLOCKS})) == f"{way}=int8(16)"
    both = Edge("x", gather=NARROW, scatter=BLOCKS)
    assert str(both) == "gather=cast(bfloat16), scatter=int8(16)"


GOOD = {
    "exact": Edge("x"),
    "the backend adds exact values": Edge("x", sums="backend"),
    "both ways": Edge("x", gather=NARROW, scatter=BLOCKS),
    "views by differences, sums with feedback": Edge("x", gather=fz.difference(BLOCKS), scatter=fz.feedback(BLOCKS)),
    "frozen ones otherwise": Edge("x", gather=NARROW, frozen=BLOCKS),
    "the backend adds, and views are packed": Edge("x", gather=NARROW, sums="backend"),
}
BAD = {
    "gather=feedback(int8(16)) over 'x': it keeps the error of a sum, and views are no sum": Edge(
        "x", gather=fz.feedback(BLOCKS)
    ),
    "scatter=difference(int8(16)) over 'x': it sends what is new against the values that its readers hold": Edge(
        "x", scatter=fz.difference(BLOCKS)
    ),
    "frozen=difference(int8(16)) over 'x': views that do not learn are sent once": Edge(
        "x", gather=NARROW, frozen=fz.difference(BLOCKS)
    ),
    "frozen=cast(bfloat16) over 'x': views that do not learn are sent once": Edge(
        "x", gather=fz.difference(BLOCKS), frozen=NARROW
    ),
    "sums='backend' over 'x': the backend adds what is on the wire, and int8(16) packs it": Edge(
        "x", scatter=BLOCKS, sums="backend"
    ),
}


@pytest.mark.parametrize("born", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GOOD)
def test_an_edge_that_holds_its_laws_is_itself(name, born):
    assert GOOD[name].proven(born, CPU) is GOOD[name]


@pytest.mark.parametrize("why", BAD)
def test_an_edge_that_cannot_be_right_says_why(why):
    with pytest.raises(ValueError) as e:
        BAD[why].proven(torch.float32, CPU)
    assert str(e.value).startswith(why)


@pytest.mark.parametrize("way", WAYS)
def test_a_wire_is_tried_in_every_direction_in_which_it_stands(way):
    deaf = NARROW._replace(name="deaf", pack=lambda x, lengths, key: x.nan_to_num().bfloat16())
    with pytest.raises(ValueError, match="wire 'deaf': nan reads as a finite value"):
        Edge("x", **{way: deaf}).proven(torch.float32, CPU)

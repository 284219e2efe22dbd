"""One apply's units: what is gathered and under way, counted; and leaves that a loss may read and not write."""

from __future__ import annotations

import pytest
import torch

import funczero as fz
from funczero import P, tree
from funczero.core.link import Link
from funczero.testing import simulate

BLOCKS = 3
TWO = {"data": 2}


def params():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)
    return {"in": draw(4, 6), "blocks": [{"w": draw(6, 6), "b": draw(6)} for _ in range(BLOCKS)]}


def within(sizes, look, stage=3, **kw):
    """`look(tape, params)` inside the loss of an update; what it returned, and the tape when all is over."""
    seen = []

    def loss(p, b):
        tape = p["blocks"][0]["w"].tape
        seen.append((look(tape, p), tape))
        h = fz.layers(lambda q, x: torch.tanh(x @ q["w"] + q["b"]), p["blocks"], b["x"] @ p["in"])
        return h.sum(), torch.tensor(float(len(h)))

    grad = fz.value_and_grad(loss, batch=P(tuple(sizes)), units="blocks")
    if stage == 3:
        parts = (fz.shard("data", grad, fz.sgd(0.1)),)
    elif stage == "nested":
        parts = (fz.shard("node", fz.shard("data", grad, fz.sgd(0.1))),)
    else:
        parts = (grad, fz.all_reduce("data"), fz.sgd(0.1))
    step = fz.train_step(*parts, mesh=sizes, **kw)
    state = step.init(params())
    step(state, step.local_rows({"x": torch.ones(12, 4)}))
    return seen[0]


def numbers(tape):
    """Units at the seam."""
    return [u for u, unit in enumerate(tape.whole.structure.units) if unit.seam]


def is_whole(tape, unit, buffer):
    """Do the leaves in a unit's buffer have the values that were given?"""
    given = dict(tree.paths(params()))
    paths = [tape.whole.structure.leaves[i].path for i in tape.whole.structure.members[unit]]
    return all(torch.equal(x, given[n]) for x, n in zip(tape.whole.views(unit, buffer), paths, strict=True))


NESTS = [(TWO, 3), ({"data": 3}, 3), ({"node": 2, "data": 2}, "nested"), (TWO, 0), ({"data": 1}, 3)]


@pytest.mark.parametrize(("sizes", "stage"), NESTS, ids=str)
def test_a_unit_that_is_taken_is_whole_however_its_views_rest(sizes, stage):
    look = lambda tape, p: [is_whole(tape, u, tape.enter((u,))[0][u]) for u in reversed(numbers(tape))]
    world = torch.Size(sizes.values()).numel()
    assert [found for found, _ in simulate(sizes)(within, sizes, look, stage)] == [[True] * BLOCKS] * world


@pytest.mark.parametrize(("sizes", "stage"), NESTS, ids=str)
def test_after_an_update_nothing_is_open_or_under_way_and_at_most_two_were(sizes, stage):
    for _, tape in simulate(sizes)(within, sizes, lambda tape, p: None, stage):
        assert (tape.gathers is not None) == (bool(tape.rest) and tape.seam)
        if tape.gathers is not None:
            found = tape.gathers
            assert (found.open, found.here, found.flying, found.kept) == ({}, {}, {}, set())
            assert (found.live, found.peak) == (0, 2)


def lives(tape, p):
    """What is counted as messages come and go."""
    found, (first, second, third) = tape.gathers, numbers(tape)
    found.land()
    out = [found.live]
    found.launch((first, second))
    found.launch((first,))  # it is under way
    out.append((found.live, sorted(found.flying) == [first, second]))
    buffers = found.take((first,))
    out.append((found.live, found.flying, sorted(found.here) == [second]))
    found.leave((first,))
    out.append(found.live)  # the other half of the message is still here
    buffers = found.take((second,))
    found.keep(buffers)
    out.append((found.live, found.kept == {second}))
    found.launch((third, second))  # the second one is here
    out.append((found.live, sorted(found.flying) == [third]))
    found.end()
    out.append((found.live, found.flying, found.here, found.open))
    return out


def test_what_travels_and_what_is_open_is_counted_by_messages():
    for out, tape in simulate(TWO)(within, TWO, lives):
        assert out == [0, (1, True), (1, {}, True), 1, (1, True), (2, True), (0, {}, {}, {})] and tape.gathers.live == 0


def sent(tape, p):
    """Bytes of a launch, of a second one while the first is under way, and of one that waits for `prefetch`."""
    mesh, found, unit = tape.env.mesh, tape.gathers, numbers(tape)[1]
    found.land()
    out = []
    for launch in (found.launch, found.launch, found.ahead):
        with fz.count_bytes(mesh) as counted:
            launch((unit,))
        out.append(sum(counted.values()))
    found.land()
    with fz.count_bytes(mesh) as counted:
        found.ahead((unit,))
    out.append(sum(counted.values()))
    found.land()
    return out


@pytest.mark.parametrize("ahead", [True, False])
def test_a_unit_is_gathered_once_and_ahead_only_where_the_step_says_so(ahead):
    for (first, *again, later), _ in simulate(TWO)(lambda: within(TWO, sent, prefetch=ahead)):
        assert first > 0 and again == [0, 0] and later == (first if ahead else 0)


def test_the_unit_that_a_forward_opened_first_is_known_to_the_next_one():
    """It alone starts to travel before the loss runs: a guess would cost memory."""

    def firsts():
        seen = []

        def loss(p, b):
            tape = p["blocks"][0]["w"].tape
            name = lambda u: tape.whole.structure.units[u].name
            seen.append(([name(u) for u in tape.course.first()], [name(u) for u in tape.gathers.flying]))
            h = fz.layers(lambda q, x: torch.tanh(x @ q["w"] + q["b"]), p["blocks"][::-1], b["x"] @ p["in"])
            return h.sum(), torch.tensor(float(len(h)))

        grad = fz.value_and_grad(loss, batch=P("data"), units="blocks")
        step = fz.train_step(fz.shard("data", grad, fz.sgd(0.1)), mesh=TWO, link=Link(latency=0.0))
        state = step.init(params())
        for _ in range(2):
            state, _ = step(state, step.local_rows({"x": torch.ones(12, 4)}))
        return seen

    last = [f"blocks/{BLOCKS - 1}"]
    assert simulate(TWO)(firsts) == [[([], []), (last, last)]] * 2


# --- leaves -----------------------------------------------------------------------------------------------------------
WRITES = {
    "in place": lambda x: x.add_(1.0),
    "at an index": lambda x: x.__setitem__(0, 7.0),
    "its data": lambda x: x.data.add_(1.0),
    "the sign of a zero": lambda x: x.data.zero_().neg_(),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_is_seen_by_its_leaf_and_by_copies_where_no_counter_moves(how):
    def look(tape, p):
        # leaves of one buffer, each with a counter of its own
        (unit,) = numbers(tape)[:1]
        leaves = tape.open_leaves(tape.enter((unit,))[0])
        written, other = leaves.items()
        before = {i: x.detach().clone() for i, x in leaves.items()}
        if how == "the sign of a zero":
            before[written[0]].zero_()
        with torch.no_grad():
            WRITES[how](written[1])
        tape.untouched(dict([other]), before)
        said = []
        for copies in (None, before):
            try:
                tape.untouched(leaves, copies)
                said.append("")
            except RuntimeError as e:
                said.append(str(e))
        return said

    for world in (1, 2):
        for (plain, compared), _ in simulate({"data": world})(within, {"data": world}, look):
            assert compared.startswith("the loss writes into parameter 'blocks/0/") and "write a new tensor" in compared
            assert plain == (compared if how in ("in place", "at an index") else "")


def test_a_write_into_a_leaf_that_a_loss_held_is_told_and_its_memory_is_not_kept():
    def look(tape, p):
        held, dropped = (tape.whole.views(u, tape.enter((u,))[0][u])[0].data.clone() for u in numbers(tape)[:2])
        index = lambda n: tape.whole.structure.members[numbers(tape)[n]][0]
        tape.lend({index(0): held})
        tape.left_alone({}, None)
        for n, x in enumerate([held, dropped]):
            tape.lent.clear()
            tape.lend({index(n): x})
            x.add_(1.0)
            assert tape.lent[0].writes.untyped_storage().nbytes() == 0
            if n:
                del x, dropped
            with pytest.raises(RuntimeError, match=f"the loss writes into parameter 'blocks/{n}/"):
                tape.left_alone({}, None)
        tape.lent.clear()

    simulate(TWO)(within, TWO, look)

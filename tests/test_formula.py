"""An optimizer's formula: written once, run on any pieces, in place or on copies, and as the plain pair."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import zoo
from cover import params as covered
from optimizers import F32, F64, MAKERS, ORACLES, PAIRS, close, masters

import funczero as fz
from funczero import P, tree
from funczero.core.optimizer import Formula, GradientTransformation, Group, Reading
from funczero.layout.lazy import lazy
from funczero.layout.slots import Slots
from funczero.testing import tree_hash
from funczero.transforms.formula import optimizer, pieces, run


# --- pieces -----------------------------------------------------------------------------------------------------------
def slots(seed):
    g = torch.Generator().manual_seed(seed)
    params = tree.map(lambda x: torch.randn(x.shape, generator=g), zoo.params())
    params["head"]["scale"] = params["norm"]
    return lazy(params, ("blocks",), {}, lambda path: path == "conv", torch.device("cpu")).at((), torch.float32)


@pytest.mark.parametrize("name", MAKERS)
def test_a_formula_gives_the_same_bits_on_any_pieces(name):
    """Whole buffers, one unit at a time, one leaf at a time."""
    tx, found = MAKERS[name](1e-2, weight_decay=0.1), set()
    params = slots(0).trainable()
    where = params.where
    trained = [i for i in range(len(where.structure.leaves)) if not where.structure.frozen(i) and where.slots[i].length]
    by_unit = [tuple(i for i in members if i in trained) for members in where.structure.members]
    for cut in ([None], [tuple(trained)], by_unit, [(i,) for i in trained]):
        p, state, ok = tree.clone(params), tx.init(params), torch.ones((), dtype=torch.bool)
        for seed in (1, 2):
            read = tx.formula.read(state, p, ok, False)
            groups = [Group(read.groups[0].rates, leaves) for leaves in cut]
            state = run(
                tx.formula,
                Reading(groups, read.rates, read.lr),
                p,
                slots(seed).trainable(),
                torch.tensor(0.5, dtype=F64),
                state,
                ok,
            )
        found.add(tree_hash([p, state]))
    assert len(found) == 1


def test_whole_units_are_one_piece_and_padding_goes_along():
    x = slots(0)
    where, first = x.where, x.where.structure.members[1]
    (whole,) = pieces((x,), first)
    assert whole[0] is x.buffers[1] and len(whole) == 1
    (cut,) = pieces((x,), first[:1])
    assert (
        cut[0].data_ptr() == x.buffers[1].data_ptr()
        and cut[0].numel() == where.slots[first[0]].length
        and isinstance(x, Slots)
    )


@pytest.mark.parametrize("by_leaf", [False, True])
def test_pieces_of_every_tree_are_the_same_leaves_once(by_leaf):
    """Written through its pieces, a tree changes where the wanted leaves lie and nowhere else."""
    x, y = slots(0), slots(1)
    where = x.where
    for wanted in ([0], [3, 1], [5, 6, 7], list(range(len(where.structure.leaves)))):
        found, other = pieces((tree.clone(x), y), tuple(wanted), by_leaf)
        assert [p.shape for p in found] == [p.shape for p in other]
        marked = tree.clone(x)
        for p in pieces((marked, y), tuple(wanted), by_leaf)[0]:
            p.add_(1)
        for i, (a, b) in enumerate(zip(marked.leaves(), x.leaves(), strict=True)):
            assert torch.equal(a, b + 1 if i in wanted else b)


def test_without_leaves_pieces_are_all_that_have_a_gradient():
    x, grads = slots(0), slots(1).trainable()
    frozen = [u.frozen for u in x.where.structure.units]
    found, theirs = pieces((x, grads), None)
    assert any(frozen) and len(found) == len(frozen) - sum(frozen)
    assert all(a is b for a, b in zip(found, (b for b, still in zip(x.buffers, frozen) if not still), strict=True))
    by_leaf = pieces((x, grads), None, by_leaf=True)[1]
    kept = [i for i in range(len(x.where.structure.leaves)) if not x.where.structure.frozen(i)]
    assert len(theirs) < len(by_leaf) == len(kept)


# --- the pair ---------------------------------------------------------------------------------------------------------
SINGLE = [name for name in PAIRS if name != "a partition"]
BOUNDS = [(F64, 1e-13), (F32, 1e-6)]


@pytest.mark.parametrize(
    ("name", "dtype", "atol"),
    covered([(n, *d) for i, n in enumerate(SINGLE) for d in BOUNDS[:: 1 - 2 * (i % 2)]], by=1),
)
def test_the_fused_form_is_the_plain_one(name, dtype, atol):
    """The formula is plain arithmetic's, and the pair that is made of it gives its values."""
    tx, got = PAIRS[name][0], masters(PAIRS[name][0], dtype=dtype)[0]
    close(got, masters(fz.lift((tx.init, tx.update), elementwise=True), dtype=dtype)[0], atol)
    if name in ORACLES:
        close(got, masters(ORACLES[name], dtype=dtype)[0], atol)


def test_the_pairs_updates_keep_what_a_large_parameter_would_round_away():
    """Its updates are differences in float64, as an optimizer further right reads them."""
    tx = fz.adamw(1e-9, weight_decay=0.0)
    params = {"w": torch.ones(16)}
    updates, state = tx.update({"w": torch.full((16,), 0.5)}, tx.init(params), params)
    torch.testing.assert_close(updates["w"], torch.full((16,), -1e-9), rtol=1e-6, atol=0)
    assert state.count == 1 and state.mu["w"].dtype == torch.float32 and torch.equal(params["w"], torch.ones(16))


class Half(NamedTuple):
    seen: Any
    rates: Any = ()


def test_a_pair_hands_a_formula_copies_in_float64_and_rounds_once():
    """p - p / 3, with what was seen as moments: the formula may write on all of its arguments."""
    dtypes = []

    def leaf(params, grads, moments, each):
        for p, g, m in zip(params, grads, *moments, strict=True):
            dtypes.append((p.dtype, g.dtype, m.dtype))
            m.add_(g)
            p.sub_(p / 3)
            g.zero_()

    read = lambda own, params, ok, donate: Reading([Group({})], None, torch.tensor(0.0))
    formula = Formula(read, lambda own: [own.seen], lambda own, rates, factor, ok: (own, [None]), leaf)
    tx = optimizer("half", lambda params: Half(tree.map(torch.zeros_like, params)), formula)
    params = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([0.1], dtype=torch.bfloat16)}
    grads = tree.map(torch.ones_like, params)
    before = tree_hash([params, grads])
    updates, state = tx.update(grads, tx.init(params), params)
    assert tree_hash([params, grads]) == before and dtypes == [(F64, F64, F64)] * 2
    assert tree.map(lambda u, p: torch.equal(u, (-p.double() / 3).to(p.dtype)), updates, params) == {
        "a": True,
        "b": True,
    }
    assert tree_hash(state.seen) == tree_hash(grads)


# --- a formula of one's own -------------------------------------------------------------------------------------------
X = {"x": torch.tensor([[1.0, 2.0], [3.0, -4.0]])}


class Mine(NamedTuple):
    rates: Any = ()


def test_a_formula_owns_what_it_is_given():
    """In place on its arguments, yet a pure step leaves its own alone."""

    def leaf(params, grads, moments, factor):
        for p, g in zip(params, grads, strict=True):
            p.sub_(g * factor)

    lr = torch.tensor(7.0, dtype=torch.float64)
    formula = Formula(
        lambda own, params, ok, donate: Reading([Group({})], None, lr),
        lambda own: [],
        lambda own, rates, factor, ok: (own, [factor]),
        leaf,
    )
    tx = GradientTransformation(lambda p: Mine(), lambda u, s, p: (u, s), formula, "mine", elementwise=True)
    linear = lambda p, b: ((b["x"] @ p["w"]).sum(), torch.tensor(float(len(b["x"]))))
    step = fz.train_step(fz.value_and_grad(linear, batch=P("data")), fz.shard("data", tx), mesh={"data": 1})
    first = step.init({"w": torch.zeros(2)})
    state, m = step(first, X)
    assert step.params(state)["w"].tolist() == [-2.0, 1.0] and m.lr == 7
    assert step.params(first)["w"].tolist() == [0.0, 0.0]

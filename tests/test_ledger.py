"""All launches as one number: the same for the same launches in the same calls, and another for any others."""

from __future__ import annotations

from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given
from layouts import structure

import funczero as fz
from funczero.world.entries import Context, Entry, Log
from funczero.world.ledger import KEPT, LISTED, NAN, Ledger

AXES, VERBS = st.sampled_from(["data", "node"]), st.sampled_from(["all_gather", "reduce_scatter"])
LAUNCH = st.tuples(
    VERBS, AXES, st.sampled_from(["float32", "int8(64)"]), st.integers(0, 3), st.just(()) | st.just((1,))
)
CALL = st.builds(Context, st.sampled_from(["step", "eval"]), st.integers(0, 2), st.integers(0, 1), st.just((0.5,)))
DONE = st.lists(LAUNCH | CALL, max_size=6)


def after(done):
    """A ledger in which so much was called and launched; what was launched, with its call."""
    ledger, launched, call = Ledger(), [], Context("no call")
    for x in done:
        if isinstance(x, Context):
            ledger.enter(x)
            call = x
        else:
            ledger.note(*x)
            launched.append((call[:5] if call.call != "no call" else None, x))
    return ledger, launched


@given(DONE, DONE)
def test_checksums_are_equal_if_and_only_if_the_same_was_launched_in_the_same_calls(one, other):
    (a, xs), (b, ys) = after(one), after(other)
    assert (a.sum == b.sum) == (xs == ys)
    assert [(e.verb, e.axis, e.dtype, e.nbytes, e.units) for e in a.entries] == [x for _, x in xs]


@given(CALL)
def test_a_call_that_launches_nothing_leaves_no_trace(call):
    ledger = Ledger()
    ledger.note("all_gather", "data")
    before = ledger.sum
    ledger.enter(call)
    ledger.enter(Context("no call"))
    assert ledger.sum == before and len(ledger.entries) == 1


def test_a_checksum_is_the_same_in_every_process():
    """As hash(str) is not: it is compared across them. Taken once, on 64 bits."""
    ledger = Ledger()
    ledger.enter(Context("step(state, batch)", 3, 7, (0.25, 2), 11))
    ledger.note("all_gather", "data", "float32", 64, (0, 2))
    assert ledger.sum == 1457779208651166595


def test_the_log_of_the_thread_has_the_same_entries():
    class Watched(NamedTuple):
        log: Log

    ledger = Ledger()
    ledger.watch = Watched(Log(8))
    ledger.enter(Context("eval", 1))
    for n in (8, 16):
        ledger.note("all_gather", "data", "float32", n)
    assert [e for *_, e in ledger.watch.log.entries] == list(ledger.entries) and ledger.watch.log.count == 2


# --- a sum ------------------------------------------------------------------------------------------------------------
def test_a_seal_closes_what_was_launched_with_the_sum_itself_and_hands_out_rows_once():
    ledger = Ledger()
    ledger.note("all_gather", "data")
    ledger.mix_rows([3, 4])
    total, rows = ledger.seal("data", 16)
    assert total == ledger.sum and rows and not ledger.entries
    assert [e.verb for e in ledger.sealed] == ["all_gather", "all_reduce"]
    assert ledger.sealed[-1][1:5] == ("all_reduce", "data", "int64", 16)
    assert ledger.seal("data", 16)[1] == 0


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3), st.data())
def test_rows_are_a_number_of_all_batches_in_their_order(batches, data):
    def rows(of):
        ledger = Ledger()
        for numbers in of:
            ledger.mix_rows(numbers)
        return ledger.rows

    other = data.draw(st.permutations(batches))
    assert (rows(other) == rows(batches)) == (list(other) == batches)


def test_what_agreed_is_forgotten_and_what_did_not_agree_yet_is_remembered():
    ledger = Ledger()
    ledger.place, ledger.ranks = 0, 2
    for n in range(3):
        ledger.note("all_gather", "data", "float32", n)
        total, _ = ledger.seal("data", 8)
    assert len(ledger.sealed) == 6
    ledger.agreed([total, total])
    assert not ledger.sealed and ledger.sum == total
    for _ in range(KEPT + 5):
        ledger.note("all_gather", "data")
    assert len(ledger.entries) == KEPT


# --- what a call is entered with --------------------------------------------------------------------------------------
class Own(NamedTuple):
    count: torch.Tensor
    mu: torch.Tensor
    rates: object


def test_the_scalars_of_a_state_are_its_numbers_on_the_cpu_by_name():
    """0-d fields and rates; neither moments, nor what is elsewhere, nor a stream's own count."""
    rates = {"lr": torch.tensor(0.5), "weight_decay": {"w": torch.tensor(0.1), "": torch.tensor(0.0)}}
    chain = {
        "adamw": Own(torch.tensor(3.0), torch.zeros(4), rates),
        "scale_loss": Own(torch.tensor(2.0), torch.zeros(4), ()),
        "sgd": Own(torch.zeros((), device="meta"), torch.zeros(1), ()),
        "accumulate": Own(torch.tensor(1), torch.zeros(1), ()),
        "param_groups": {"lr": torch.tensor([1.0, 2.0]), "names": torch.zeros(LISTED + 1)},
    }
    ledger = Ledger()
    for _ in range(2):  # the second time from the plan of the first
        names, values = ledger.scalars(chain)
        found = dict(zip(names, values, strict=True))
        assert found == {
            "adamw.count": 3.0,
            "adamw.rates.lr": 0.5,
            "adamw.rates.weight_decay.w": pytest.approx(0.1),
            "adamw.rates.weight_decay.": 0.0,
            "scale_loss.count": 2.0,
            "param_groups.lr[0]": 1.0,
            "param_groups.lr[1]": 2.0,
            "learning rate of the last update": NAN,
        }


def test_a_nan_is_a_number_that_ranks_can_compare():
    ledger, chain = Ledger(), {"sgd": Own(torch.tensor(torch.nan), torch.zeros(1), ())}
    assert ledger.scalars(chain)[1] == (NAN, NAN) and hash(ledger.scalars(chain)[1]) == hash((NAN, NAN))
    ledger.lr = 0.25
    assert ledger.scalars(chain)[1] == (NAN, 0.25)


def test_a_leaf_that_is_no_tensor_any_more_is_left_to_whoever_reads_it():
    ledger = Ledger()
    chain = {"sgd": Own(torch.tensor(1.0), torch.zeros(1), {"lr": torch.tensor(0.5)})}
    ledger.scalars(chain)
    broken = {"sgd": Own(7, torch.zeros(1), {})}
    assert ledger.scalars(broken)[1] == (NAN, NAN, NAN)


def test_a_chain_and_its_leaves_have_one_number_for_whoever_says_the_same():
    ledger, other = Ledger(), Ledger()
    for each in (ledger, other):
        each.chain = ["mesh data=2", "adamw -> new parameters"]
    a, b = structure(zoo.params(), ("blocks",)).structure, structure(zoo.params(), ("blocks",)).structure
    spec, units = ledger.describe(a)
    assert ledger.describe(a) == (spec, units) == other.describe(b) and units == tuple(u.name for u in a.units)
    assert ledger.texts[spec].startswith("mesh data=2\nadamw -> new parameters\n")
    otherwise = Ledger()
    otherwise.chain = ["mesh data=2", "sgd -> new parameters"]
    without_units = structure(zoo.params()).structure
    specs = {spec, ledger.describe(None)[0], ledger.describe(without_units)[0], otherwise.describe(a)[0]}
    assert len(specs) == 4 and ledger.describe(None)[1] == ()


def test_copies_of_a_mesh_share_one_ledger():
    mesh = zoo.make(0, mesh={"data": 1}).running().env.mesh
    copy = mesh._replace(device=torch.device("meta"))
    with fz.count_bytes(copy) as sent:
        mesh.ledger.note("all_gather", "data", "float32", 8)
    assert copy.ledger is mesh.ledger and copy.ledger.entries[-1] == Entry(
        mesh.ledger.context, "all_gather", "data", "float32", 8
    )
    assert not sent  # what is noted is not counted: launches do both

"""Batches of a dataset are a function of (seed, step): for any world, any worker, and a run resumed anywhere."""

from __future__ import annotations

import itertools
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader, Dataset, TensorDataset

import funczero as fz
from funczero.data import Batches, epoch_order
from funczero.testing import tree_hash

SIZES = st.integers(1, 40), st.integers(1, 12)  # items, rows
g = fz.value_and_grad(lambda p, b: ((b["x"] @ p["w"] * b["weight"]).sum(), b["weight"].sum()), batch=fz.P("data"))
nested = fz.value_and_grad(
    lambda p, b: ((b["x"] @ p["w"] * b["weight"]).sum(), b["weight"].sum()), batch=fz.P(("node", "local"))
)
sgd = fz.sgd(0.1)
CHAINS = {
    "flat": ([g, fz.shard("data", sgd)], {"data": -1}),
    "time first": ([g, fz.accumulate(3), fz.shard("data", sgd)], {"data": -1}),
    "ranks first": ([fz.shard("data", g, fz.accumulate(3), sgd)], {"data": -1}),
    "nested": (
        [fz.shard("node", fz.shard("local", nested, fz.accumulate(2), fz.accumulate(3), sgd))],
        {"node": -1, "local": 2},
    ),
    "streamed": ([fz.shard("data", g, fz.accumulate(2), fz.accumulate(3, stream=True), sgd)], {"data": -1}),
}


class Noisy(Dataset):
    """Items with noise drawn from their keys, as an augmentation would."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        noise = torch.rand(3, generator=fz.rng.generator(row.key))
        return {
            "x": torch.full((3,), float(row)) + noise,
            "item": torch.tensor(row),
            "weight": torch.tensor(row.weight),
        }


def collated(dataset, rows):
    return torch.utils.data.default_collate([dataset[row] for row in rows])


def same(a, b):
    return fz.tree.leaves(fz.tree.map(torch.equal, a, b)) == [True] * len(fz.tree.leaves(a))


def test_epoch_order_is_a_pure_permutation():
    orders = [epoch_order(100, *at) for at in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert (orders[0] == orders[1]).all() and (orders[0] != orders[2]).any() and (orders[0] != orders[3]).any()
    assert len(epoch_order(0, 0, 0)) == 0 and (epoch_order(100, np.int64(1), np.int64(0)) == orders[3]).all()


def test_the_order_is_frozen():
    """Another order would give a resumed run other batches: this one is for good."""
    assert epoch_order(12, seed=5, epoch=2).tolist() == [7, 3, 1, 10, 0, 2, 6, 4, 5, 9, 8, 11]
    assert [row.key for row in Batches(12, 2, seed=5)[13]] == [8393568035665313143, 6534091738897344878]


@given(*SIZES, st.integers(0, 3), st.booleans())
def test_an_epoch_visits_every_item_once(items, rows, epoch, shuffle):
    for last in ("pad", "short") + ("drop",) * (rows <= items):
        batches = Batches(items, rows, seed=7, last=last, shuffle=shuffle)
        steps = [batches[epoch * batches.per_epoch + i] for i in range(batches.per_epoch)]
        seen = [row for step in steps for row in step if row.weight]
        order = epoch_order(items, 7, epoch).tolist() if shuffle else list(range(items))
        assert seen == order[: items // rows * rows] if last == "drop" else seen == order
        assert all(row.epoch == epoch for step in steps for row in step)
        sizes = {len(step) for step in steps[:-1]} | ({len(steps[-1])} if last != "short" else set())
        assert sizes <= {rows} and len(steps[-1]) == (items % rows or rows if last == "short" else rows)


def test_padding_is_real_items_of_no_weight():
    batches = Batches(3, 8, last="pad")
    assert (
        set(batches[4]) == {0, 1, 2}
        and batches.weights(4).tolist() == [1.0] * 3 + [0.0] * 5
        and batches.weights(4).dtype == torch.float32
    )
    assert Batches(3, 8, last="short").weights(1).tolist() == [1.0] * 3


@given(*SIZES, st.integers(0, 60), st.sampled_from(["pad", "short"]))
def test_iterating_from_a_step_is_the_rest_of_iterating(items, rows, step, last):
    batches = Batches(items, rows, last=last)
    whole = list(itertools.islice(batches, 70))
    assert list(batches.at(step, stop=70)) == whole[step:] and len(batches.at(step, stop=70)) == 70 - step
    assert whole[step] == batches[step] and list(batches.at(71, stop=70)) == [] and len(batches.at(71, stop=70)) == 0


def test_epochs_and_seeds_differ():
    batches = Batches(100, 10)
    assert batches[0] != batches[10] and batches[0] != Batches(100, 10, seed=1)[0] and batches[0] == Batches(100, 10)[0]
    keys = {(step, row): row.key for b in (batches, Batches(100, 10, seed=1)) for step in range(20) for row in b[step]}
    assert len(set(keys.values())) == len(keys) and all(0 <= key < 2**63 for key in keys.values())


def test_a_row_is_an_int_that_travels():
    row = Batches(10, 4, seed=3)[5][2]
    twin = pickle.loads(pickle.dumps(row))
    assert twin == row and twin.key == row.key and twin.epoch == row.epoch == 2 and twin.weight == 1.0
    assert list(range(10))[row] == np.arange(10)[row] == torch.arange(10)[row] == row and repr(row) == str(int(row))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_on_the_exact_next_batch(workers):
    """Thirteen items in fours: steps 0-3 are the first epoch, 4-7 the second.

    Every position, mid-epoch and at its end.
    """
    dataset, batches = Noisy(13), Batches(13, 4, seed=1, last="short")
    whole = [collated(dataset, batches[step]) for step in range(9)]
    for step in range(9) if not workers else (0, 2, 4, 7):
        loader = DataLoader(dataset, batch_sampler=batches.at(step, stop=9), num_workers=workers)
        assert len(loader) == 9 - step
        for again in range(2):  # a loader that is iterated again begins at its start again
            got = list(loader)
            assert len(got) == 9 - step and all(same(a, b) for a, b in zip(got, whole[step:], strict=True)), again


def test_workers_that_fetched_ahead_do_not_move_the_position():
    dataset, batches = Noisy(50), Batches(50, 4)
    endless = iter(DataLoader(dataset, batch_sampler=batches, num_workers=2, prefetch_factor=4))
    first = [next(endless) for _ in range(3)]
    resumed = next(iter(DataLoader(dataset, batch_sampler=batches.at(3), num_workers=2)))
    assert (
        same(first[2], collated(dataset, batches[2]))
        and same(resumed, collated(dataset, batches[3]))
        and same(resumed, next(endless))
    )


def test_a_dataset_that_knows_nothing_of_rows():
    x = torch.arange(10.0)
    batches = Batches(10, 4, last="pad")
    for step, (loaded,) in enumerate(DataLoader(TensorDataset(x), batch_sampler=batches.at(0, stop=3))):
        assert (
            loaded.tolist() == [float(row) for row in batches[step]] and batches.weights(step).sum() == (4, 4, 2)[step]
        )


def dealt_as_the_global_batch(name, last):
    """In a rank: rows of `local` against `local_rows`, over the end of an epoch; the rows this rank asked for."""
    parts, mesh = CHAINS[name]
    step = fz.train_step(*parts, mesh=mesh)
    dataset, batches = Noisy(120), Batches(120, 48, seed=2, last=last)
    mine = batches.local(step)
    for number in range(1, 6):
        want = step.local_rows(collated(dataset, batches[number]))
        calls = list(mine.at(number, stop=number + 1))
        assert len(calls) == (3 if name == "streamed" else 1) == len(mine.at(number, stop=number + 1))
        got = fz.tree.map(lambda *xs: torch.cat(xs), *[collated(dataset, rows) for rows in calls])
        assert same(got, want) and torch.equal(mine.weights(number), want["weight"])
    return [int(row) for row in mine[0]]


@pytest.mark.parametrize("last", ["drop", "pad", "short"])
@pytest.mark.parametrize(
    "world, name", [(world, name) for world in (1, 2, 4) for name in CHAINS if (world, name) != (1, "nested")]
)
def test_a_rank_loads_its_rows_alone(run_world, world, name, last):
    got = run_world(world, dealt_as_the_global_batch, name, last)
    assert sorted(row for rows in got for row in rows) == sorted(map(int, Batches(120, 48, seed=2, last=last)[0]))


def trained(steps, resume, stream):
    """In a rank: the parameters after `steps` updates of four micro-batches, with a fresh loader at every step in
    `resume`.
    """
    step = fz.train_step(
        fz.shard("data", g, fz.accumulate(4 // torch.distributed.get_world_size(), stream=stream), sgd),
        mesh={"data": -1},
    )
    state, dataset = step.init({"w": torch.ones(3)}), Noisy(21)
    batches = Batches(21, 8, last="pad").local(step)
    while (now := int(state.step)) < steps:
        pause = min([r for r in resume if r > now], default=steps)
        for batch in DataLoader(dataset, batch_sampler=batches.at(state, stop=pause)):
            state, _ = step(state, batch)
            if stream and len(list(batches.at(state, stop=int(state.step) + 1))) == 0:
                state, _ = step(state, None)
    return tree_hash(step.params(state))


@pytest.mark.parametrize("stream", [False, True])
def test_training_is_the_same_on_any_world_and_resumed_anywhere(run_world, stream):
    hashes = [
        set(run_world(world, trained, 7, resume, stream)) for world in (1, 2) for resume in ((), (1, 2, 5), (3, 6))
    ]
    assert len(set().union(*hashes)) == 1


def test_a_streamed_window_resumes_within():
    """A state that is two micro-batches into its update goes on with the third."""
    step = fz.train_step(fz.shard("data", g, fz.accumulate(3, stream=True), sgd), mesh={"data": 1})
    dataset, batches = Noisy(30), Batches(30, 6)
    local, state = batches.local(step), step.init({"w": torch.ones(3)})
    calls = list(local.at(state, stop=2))
    assert [len(rows) for rows in calls] == [2] * 6
    for taken, rows in enumerate(calls[:3]):
        assert list(local.at(state, stop=2)) == calls[taken:] and len(local.at(state, stop=2)) == 6 - taken
        state, _ = step(state, collated(dataset, rows))
    with pytest.raises(
        ValueError, match=r"3 micro-batches into its update, .*; write batches.local\(step\).at\(state\)"
    ):
        batches.at(state)
    assert list(local.at(state, stop=2)) == calls[3:]  # a full window: the next micro-batch is the next step's
    state, _ = step(state, None)
    assert list(local.at(state, stop=2)) == calls[3:]


WRONG = {
    "Batches: the dataset is empty (items=0); give one that holds at least one item": lambda: Batches(0, 4),
    "Batches: 3 items are fewer than one batch of 8 rows, and last='drop' would drop them all;"
    " write last='pad' or last='short', or at most rows=3": lambda: Batches(3, 8),
    "Batches: last='keep' is none of 'drop', 'pad', 'short'; 'drop' leaves an epoch's last short batch out": (
        lambda: Batches(9, 8, last="keep")
    ),
    "Batches: items=[1, 2] is not a whole number of at least 0; write len(dataset)": lambda: Batches([1, 2], 8),
    "Batches: rows=0 is not a whole number of at least 1; write an int such as 2": lambda: Batches(9, 0),
    "Batches: rows=4.0 is not a whole number of at least 1; write an int such as 2": lambda: Batches(9, 4.0),
    "Batches: seed=None is not an int; write seed=0, or int(seed)": lambda: Batches(9, 4, seed=None),
    "Batches: start=-1 is not a whole number of at least 0; write batches.at(state), or a step as an int": (
        lambda: Batches(9, 4).at(-1)
    ),
    "Batches: stop=-1 is not a whole number of at least 0; write an int such as 1": (
        lambda: Batches(9, 4).at(0, stop=-1)
    ),
    "Batches: step=-2 is not a whole number of at least 0; write an int such as 1": lambda: Batches(9, 4)[-2],
    "Batches: these go on without end; write batches.at(state, stop=steps) for some with a length": (
        lambda: len(Batches(9, 4))
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        WRONG[message]()
    assert str(caught.value) == message


def test_rows_that_do_not_divide_and_states_that_are_gone():
    step = fz.train_step(fz.shard("data", g, fz.accumulate(4), sgd), mesh={"data": 1})
    with pytest.raises(
        ValueError,
        match=(
            r"a batch of rows=6 does not divide into 4 micro-batches \(data 1 x accumulate 4\); write a multiple of 4"
        ),
    ):
        Batches(20, 6).local(step)
    with pytest.raises(
        ValueError,
        match=(
            r"last batch of an epoch has 2 rows, which do not divide into 4 micro-batches \(data 1 x accumulate 4\);"
            r" write last='pad' or last='drop'"
        ),
    ):
        Batches(18, 8, last="short").local(step)
    assert Batches(20, 8, last="short").local(step).parts == 4
    donating = fz.donate(step)
    state = donating.init({"w": torch.ones(3)})
    donating(state, {"x": torch.ones(8, 3), "weight": torch.ones(8)})
    with pytest.raises(
        RuntimeError, match=r"Batches.at: this state was donated at step 0; give the state that step\(...\) returned"
    ):
        Batches(20, 8).at(state)

"""How a step is made, and what an update returns: meshes, counters, metrics, donated states."""

from __future__ import annotations

import pytest
import zoo

import funczero as fz
from funczero.testing import tree_hash

MESH = {"data": -1}


def test_counters_count_calls_and_applied_updates():
    step = zoo.make(3)
    state, log = step.init(zoo.params()), []
    for t in range(zoo.BAD - 1, zoo.BAD + 2):
        state, m = step(state, zoo.batch(t))
        log.append((int(state.step), int(state.updates), int(m.updates), m.ok.item()))
    assert log == [(1, 1, 1, True), (2, 1, 1, False), (3, 2, 2, True)]


def test_metrics_are_tensors_without_dims():
    _, m = zoo.make(2)(zoo.make(2).init(zoo.params()), zoo.batch(0))
    assert all(x.shape == () for x in m[:-1]) and m.aux is None
    assert [str(x.dtype).removeprefix("torch.") for x in m[:-1]] == [
        "float64",
        "float64",
        "float64",
        "bool",
        "bool",
        "float64",
        "float64",
        "int64",
    ]
    assert m.scale == 1 and m.lr == zoo.LR and m.weight == zoo.batch(0)["mask"].sum()


def test_without_a_mesh_all_processes_are_on_the_batchs_axis():
    parts = fz.zero(zoo.source(), *zoo.tx(), stage=2)
    assert fz.train_step(*parts).mesh.sizes() == {"data": 1}
    with pytest.raises(
        fz.ChainError,
        match=r"the batch is split over \['node', 'local'\]; write their sizes, as mesh=\{'node': 2, 'local': 2\}",
    ):
        fz.train_step(zoo.source(("node", "local")), fz.all_reduce("node"), fz.all_reduce("local"), *zoo.tx())


def unsplit():
    """A batch that is not split, on purpose: every rank sees all rows, and no gradient is sent."""
    step = fz.train_step(
        fz.value_and_grad(zoo.loss_plain, replicated=("data",)), fz.accumulate(8), *zoo.tx(), mesh=MESH
    )
    state = step.init(zoo.params())
    with fz.count_bytes(step) as sent:
        state, m = step(state, step.local_rows(zoo.batch(0)))
    return tree_hash(step.params(state)), m.weight.item(), set(sent)


def test_a_batch_that_is_not_split_is_seen_whole_and_sends_the_one_sum_in_which_ranks_compare(run_world):
    *same, sent = zoo.everywhere(run_world, 2, unsplit)
    assert same == list(unsplit()[:2]) and unsplit()[2] == set()
    assert sent == {("data", "all_reduce", "int64")}


def test_donating_twice_is_donating():
    step = fz.donate(fz.donate(zoo.make(3)))
    state, _ = step(step.init(zoo.params()), zoo.batch(0))
    assert int(step(state, zoo.batch(1))[0].step) == 2


def test_only_the_last_state_of_a_donated_run_is_of_use():
    step = fz.donate(zoo.make(0))
    first = step.init(zoo.params())
    second, _ = step(first, zoo.batch(0))
    third, _ = step(second, zoo.batch(1))
    for used, at in ((first, 0), (second, 1)):
        with pytest.raises(RuntimeError, match=f"this state was donated at step {at} and its memory is in use"):
            step(used, zoo.batch(2))
    step(third, zoo.batch(2))


# --- chains that are no step ------------------------------------------------------------------------------------------
BAD = {
    "no optimizer": (
        lambda g: (g, fz.all_reduce("data"), fz.clip_by_global_norm(1.0)),
        "train_step: no optimizer applies an update; end the chain with one, as adamw(3e-4)",
    ),
    "left open": (
        lambda g: (g, fz.reduce_scatter("data"), fz.sgd(0.1)),
        (
            "train_step: the new parameters are still split over ['data']; write shard('data', ...) around what"
            " reduce_scatter opened, or all_gather('data') after it"
        ),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_chain_that_is_no_step_is_refused_with_what_to_write(name):
    make, words = BAD[name]
    with pytest.raises(fz.ChainError) as e:
        fz.train_step(*make(zoo.source()), mesh={"data": 2})
    assert str(e.value).startswith(words)


def test_sums_are_the_trees_integers_or_the_backends():
    with pytest.raises(ValueError, match="sums='ring' is none of 'tree', 'exact' and 'backend'"):
        zoo.make(0, sums="ring")


@pytest.mark.parametrize(
    ("link", "error", "words"),
    [
        (1e-4, TypeError, r"link=0.0001 is no link; write fz.Link\(latency=seconds"),
        (fz.Link(latency=-1.0), ValueError, r"train_step\(link=...\): latency=-1.0 is below 0"),
        (fz.Link(speed=0), ValueError, r"speed=0 is not above 0"),
    ],
    ids=str,
)
def test_a_link_is_two_numbers(link, error, words):
    with pytest.raises(error, match=words):
        zoo.make(0, link=link)


def test_a_donating_step_and_the_one_it_was_made_of_are_one_in_values():
    step = zoo.make(2, right=(fz.scale_loss(init=2.0), *zoo.tx()))
    both = [step, fz.donate(step)]
    states = [s.init(zoo.params(), key=1) for s in both]
    for t in range(zoo.UPDATES):
        states, metrics = zip(*(s(state, zoo.batch(t)) for s, state in zip(both, states, strict=True)), strict=True)
        assert tree_hash(metrics[0]) == tree_hash(metrics[1])
    assert tree_hash(states[0]._asdict()) == tree_hash(states[1]._asdict())

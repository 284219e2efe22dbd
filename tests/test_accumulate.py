"""Sums over time: windows, short ones too, held in as few partial sums as there are bits in their number."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P, tree
from funczero.transforms.accumulate import Accumulate

MESH = {"data": 1}


def linear(p, b):
    return (b["x"] * p["w"]).sum(), b["m"].sum()


def rows(n, w=1.0):
    return {"x": torch.arange(1.0, n + 1), "m": torch.full((n,), w)}


def make(k, stream=True, *left, tx=None, policy=None):
    g = fz.value_and_grad(linear, batch=P("data"))
    return fz.train_step(
        fz.shard("data", g, fz.accumulate(k, stream=stream), *left, tx or fz.sgd(1.0)), mesh=MESH, policy=policy
    )


def run(step, *batches):
    state = step.init({"w": torch.zeros(())})
    for b in batches:
        state, m = step(state, b)
    return step.params(state)["w"].item(), m, state


def test_a_stream_takes_one_a_call_and_hands_over_at_none():
    step, seen = make(4), []
    state = step.init({"w": torch.zeros(())})
    for i in range(4):
        state, m = step(state, {n: x[i : i + 1] for n, x in rows(4).items()})
        own: Accumulate = state.chain["accumulate"]
        seen.append((m, int(own.count), len(own.partial), int(state.step)))
    assert seen == [(None, 1, 1, 0), (None, 2, 1, 0), (None, 3, 2, 0), (None, 4, 1, 0)]
    state, m = step(state, None)
    assert step.params(state)["w"] == -2.5 and m.loss == 0 and m.weight == 4 and int(state.step) == 1
    assert int(state.chain["accumulate"].count) == 0 and state.chain["accumulate"].partial == ()


@pytest.mark.parametrize("taken", [1, 2, 3, 4])
def test_a_short_window_closes_with_what_it_has(taken):
    """The mean is over what came."""
    micros = [{n: x[i : i + 1] for n, x in rows(4).items()} for i in range(taken)]
    w, m, _ = run(make(4), *micros, None)
    assert w == -(taken + 1) / 2 and m.weight == taken and m.ok


def test_windows_follow_one_another():
    one = {n: x[:1] for n, x in rows(1).items()}
    w, m, state = run(make(2), one, one, None, one, None, one, one, None)
    assert w == -3.0 and int(state.step) == 3 == int(m.updates)


@pytest.mark.parametrize("k", [2, 3, 8, 13])
def test_memory_is_a_partial_sum_for_every_bit(k):
    step, most = make(k), 0
    state = step.init({"w": torch.zeros(())})
    for i in range(k):
        state, _ = step(state, rows(2))
        assert len(state.chain["accumulate"].partial) == (i + 1).bit_count()
        most = max(most, (i + 1).bit_count())
    assert most <= k.bit_length()


def test_partial_sums_are_in_the_accumulate_dtype_and_a_first_gradient_in_its_own():
    step = make(4, policy="params=float32,compute=bfloat16,accumulate=float64")
    state, dtypes = step.init({"w": torch.zeros(())}), []
    for _ in range(3):
        state, _ = step(state, {n: x.bfloat16() for n, x in rows(2).items()})
        dtypes.append([p.grads.buffers[0].dtype for p in state.chain["accumulate"].partial])
    assert dtypes == [[torch.bfloat16], [torch.float64], [torch.float64, torch.bfloat16]]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_a_loop_and_a_stream_are_the_same_bits(k):
    for stage in (1, 2, 3):
        both = []
        for stream in (False, True):
            acc = fz.accumulate(k, stream=stream)
            parts = {
                1: (zoo.source(), acc, fz.shard("data", *zoo.tx())),
                2: (zoo.source(), fz.shard("data", acc, *zoo.tx())),
                3: (fz.shard("data", zoo.source(), acc, *zoo.tx()),),
            }
            both.append(zoo.bits(zoo.train(parts[stage], MESH, k if stream else 0, updates=2, micros=k)))
        assert both[0] == both[1]


def test_loops_in_loops_are_one_loop():
    """Bitwise: the digits of the index follow."""
    nested = [(8,), (2, 4), (4, 2), (2, 2, 2), (1, 8)]
    assert (
        len(
            {
                zoo.bits(
                    zoo.train((fz.shard("data", zoo.source(), *map(fz.accumulate, ks), *zoo.tx()),), MESH, updates=2)
                )
                for ks in nested
            }
        )
        == 1
    )


def test_a_window_in_the_middle_is_a_state_like_any_other():
    """Two futures of one half window; and nothing stands still but what a window must not move."""
    step, one = make(2), {n: x[:1] for n, x in rows(1).items()}
    half, _ = step(step.init({"w": torch.zeros(())}), one)
    short, _ = step(half, None)
    full, _ = step(step(half, rows(2) | {"x": torch.tensor([5.0, 5.0])})[0], None)
    assert (
        step.params(short)["w"] == -1.0
        and step.params(full)["w"] == -11 / 3
        and int(half.chain["accumulate"].count) == 1
    )
    assert "chain/accumulate/partial/0/grads/buffers/0" in dict(tree.paths(half._asdict()))


def test_weights_of_zero_count_in_a_window():
    """An empty micro-batch changes neither the sum nor the weight."""
    full, empty = rows(3), rows(2, w=0.0) | {"x": torch.zeros(2)}
    assert run(make(4), empty, full, empty, None)[0] == run(make(4), full, None)[0] == -2.0


def test_the_loss_is_the_mean_over_the_update():
    g = fz.value_and_grad(lambda p, b: (b["x"].sum() + 0 * p["w"], b["m"].sum()), batch=P("data"))
    step = fz.train_step(g, fz.accumulate(3), fz.all_reduce("data"), fz.sgd(1.0), mesh=MESH)
    _, m = step(step.init({"w": torch.zeros(())}), {"x": torch.arange(6.0), "m": torch.tensor([1.0, 1, 0, 0, 0, 3])})
    assert m.loss.item() == 3.0 and m.weight.item() == 5.0 and m.loss.dtype == torch.float64

"""step is pure: the same inputs give the same bits and are left as they were; only donate uses its state up."""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH

import funczero as fz
from funczero import P
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

EXTRA = {
    "clip_by_value": (fz.clip_by_value(0.01), fz.clip_by_global_norm(0.1), fz.adamw(1e-2)),
    "momentum": (fz.sgd(1e-2, momentum=0.9, nesterov=True),),
    "two optimizers": (fz.adamw(1.0), fz.sgd(1e-2)),
    "an average": (fz.adamw(1e-2), fz.ema(0.9, warmup=True)),
    "a projection": (fz.adamw(1e-2), fz.project(lambda w: w.clamp(-0.1, 0.1), "w", elementwise=True), fz.ema(0.5)),
    "noise, and a map": (fz.add_noise(0.01), fz.map_leaves(torch.sign, "w", elementwise=True), fz.adamw(1e-2)),
    "rules of rates": (
        fz.adamw([("blocks", 1e-2), ("", fz.schedules.constant(1e-3))], weight_decay=[("b$", 0.0), ("", 0.1)]),
    ),
}


def bits(state, m):
    return tree_hash([state._asdict(), m])


def called_twice(chains):
    """By chain: calls that gave other bits the second time, or left other bits in what they were given."""
    wrong = []
    for name, (parts, stream) in chains.items():
        step = fz.train_step(*parts, mesh={"data": -1}, policy="compute=bfloat16")
        state = step.init(zoo.params(), key=3)
        for t in range(3):
            rows = step.local_rows(zoo.batch(zoo.BAD - 1 + t, micros=zoo.FEW))
            for b in [*zoo.split(rows, stream), None] if stream else [rows]:
                before = tree_hash([state._asdict(), b])
                new, m = step(state, b)
                first, held = bits(new, m), tree_hash([state._asdict(), b])
                if held != before or bits(*step(state, b)) != first or bits(new, m) != first:
                    wrong.append((name, t))
                state = new
    return wrong


def chains_of_all_transforms(world, whole):
    """All chains, and every transform at three stages; or each transform at one of them."""
    k = zoo.FEW // world
    g = zoo.source(loss_fn=zoo.loss_random, rng=True)
    more = {
        f"{n} {stage}": (fz.zero(g, *tx, stage=stage, accumulate=k), 0)
        for i, (n, tx) in enumerate(EXTRA.items())
        for stage in ((0, 1, 3) if whole else (3, 0, 1)[i % 3 :][:1])
    }
    return zoo.flat_chains(g, k, zoo.tx(scale=True)) | more


def all_twice(whole):
    return called_twice(chains_of_all_transforms(world_size(), whole))


@EACH
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_call_finds_everything_as_it_was(run_world, world, whole):
    assert zoo.everywhere(run_world, world, all_twice, whole) == []


def test_looking_at_a_state_changes_nothing():
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=3, accumulate=4), mesh={"data": 1})
    params = zoo.params()
    before = tree_hash(params)
    state = step.init(params)
    held = tree_hash(state._asdict())
    for x in torch.utils._pytree.tree_leaves(step.params(state)):  # a copy, to do with as one likes
        x.fill_(7)
    step.eval(zoo.loss_plain)(state, zoo.batch(0))
    assert step.specs(params) and str(step)
    step(state, step.local_rows(zoo.batch(0)))
    assert tree_hash(state._asdict()) == held and tree_hash(params) == before


def donated():
    """By chain: do donated steps give the bits of pure ones, reuse the memory, and leave the batch alone?"""
    out = {}
    for stage in range(4):
        pure = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=stage, accumulate=2), mesh={"data": -1})
        step = fz.donate(pure)
        a, b = pure.init(zoo.params()), step.init(zoo.params())
        for t in range(2):
            rows = step.local_rows(zoo.batch(t))
            before, memory = tree_hash(rows), [x.data_ptr() for x in b.params.buffers]
            (a, m), (b, n) = pure(a, rows), step(b, rows)
            out[stage, t] = (
                bits(a, m) == bits(b, n),
                [x.data_ptr() for x in b.params.buffers] == memory,
                tree_hash(rows) == before,
            )
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_donate_is_the_same_bits_in_the_same_memory(run_world, world):
    assert set(zoo.everywhere(run_world, world, donated).values()) == {(True, True, True)}


def test_a_state_is_a_value_that_can_be_taken_twice():
    """Two futures from one state: neither sees the other."""
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=1), mesh={"data": 1})
    root = step.init(zoo.params())
    left, _ = step(root, zoo.batch(0))
    right, _ = step(root, zoo.batch(1))
    assert tree_hash(step(root, zoo.batch(0))[0]._asdict()) == tree_hash(left._asdict()) != tree_hash(right._asdict())


def test_the_key_and_the_step_are_all_the_randomness_there_is():
    """Two keys differ; a torch seed does not count, nor is it moved."""
    g = fz.value_and_grad(zoo.loss_random, batch=P("data"), rng=True)
    step = fz.train_step(g, fz.all_reduce("data"), *zoo.tx(), mesh={"data": 1})
    seen = []
    for key, seed in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(seed)
        _, m = step(step.init(zoo.params(), key=key), zoo.batch(0))
        seen.append((m.loss.item(), torch.rand(()).item()))
    torch.manual_seed(0)
    assert seen[0][0] == seen[1][0] != seen[2][0] and seen[0][1] == torch.rand(()).item()

"""Simulated ranks compute what one process computes, and end together."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist
import zoo

import funczero as fz
from funczero.testing import tree_hash
from funczero.testing.simulate import simulate

UPDATES = 4  # the one with a value that overflows included


def run(kind, axes, k, name, mesh, donate=False):
    parts, stream = kind(zoo.source(axes), k, zoo.tx(scale=True))[name]
    return tree_hash(zoo.train(parts, mesh, stream, UPDATES, donate=donate)[0])


@pytest.fixture(scope="module")
def alone():
    return run(zoo.flat_chains, ("data",), zoo.MICROS, "3 [grad acc", {"data": 1})


@pytest.mark.parametrize(
    "name",
    [
        "3 stream",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("1 grad acc [", "0 grad acc ar", "2 grad [acc", "3 [grad acc")
        ),
    ],
)
def test_eight_ranks_have_the_bits_of_one_process(alone, name):
    assert set(simulate({"data": 8})(run, zoo.flat_chains, ("data",), 1, name, {"data": 8}, name.startswith("3"))) == {
        alone
    }


NESTED = [
    ("hpZ once", (2, 4)),
    ("ZeRO-3", (4, 2)),
    *(
        pytest.param(n, (2, 4), marks=pytest.mark.slow)
        for n in ("ZeRO-2", "MiCS", "DDP", "ZeRO-1", "HSDP-1", "ZeRO-3", "hpZ", "hpZ outwards")
    ),
    *(pytest.param(n, (4, 2), marks=pytest.mark.slow) for n in ("MiCS", "hpZ")),
]


@pytest.mark.parametrize(("name", "sizes"), NESTED)
def test_nested_brackets_have_the_bits_of_one_process(alone, name, sizes):
    mesh = dict(zip(("node", "local"), sizes))
    assert set(simulate(mesh)(run, zoo.nested_chains, ("node", "local"), 1, name, mesh)) == {alone}


def test_a_step_alone_names_its_world():
    def places(b):
        step = fz.train_step(zoo.source(), fz.shard("data", fz.adamw(1e-2)), mesh={"data": -1})
        return (
            fz.init_distributed()[:2],
            step.local_rows(b)["x"].shape[0],
            str(step).splitlines()[0].split(",")[0],
            torch.get_num_threads(),
        )

    before = dist.is_initialized()
    assert simulate({"data": 3})(places, zoo.batch(0, micros=3)) == [
        ((r, 3), zoo.ROWS, "train_step on data=3 (cpu)", 1) for r in range(3)
    ]
    assert dist.is_initialized() == before


def test_what_one_rank_raises_is_raised_with_its_rank():
    def raising():
        if dist.get_rank() == 2:
            raise KeyError("w1")
        fz.train_step(zoo.source(), fz.shard("data", fz.adamw(1e-2)), mesh={"data": -1})
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(KeyError, match="w1") as caught:
        simulate({"data": 4})(raising)
    assert caught.value.__notes__ == ["simulate: rank 2 of 4 raised first"] and time.monotonic() - start < 5
    assert simulate({"data": 4})(dist.get_rank) == [0, 1, 2, 3]  # and the next world is whole
    assert not [t for t in threading.enumerate() if t.name.startswith("rank")]


def test_a_rank_that_returns_early_does_not_hang_the_others():
    def early():
        if dist.get_rank() != 1:
            dist.barrier()

    with pytest.raises(
        RuntimeError,
        match=(
            r"ranks \[0, 2\] wait for ranks \[1\], which have returned; every rank must make the same calls\nrank"
            r" 0:(.|\n)*in early"
        ),
    ):
        simulate({"data": 3})(early)


def test_ranks_that_wait_for_each_other_are_told():
    def crossed():
        mesh = fz.make_mesh({"node": 2, "local": 2})
        dist.barrier(mesh.get_group("node" if dist.get_rank() == 1 else "local"))

    with pytest.raises(RuntimeError, match="wait for"):
        simulate({"node": 2, "local": 2})(crossed)


def test_a_rank_that_is_long_is_named():
    def long():
        if dist.get_rank() == 1:
            time.sleep(1)

    with pytest.raises(
        TimeoutError,
        match=r"ranks \[1\] of 2 did not return within 0.2 s; this is where they are\nrank 1:(.|\n)*time.sleep\(1\)",
    ):
        simulate({"data": 2}, timeout=0.2)(long)


def test_what_is_compiled_runs_as_it_is_written():
    """A rank draws from its own generator, and compiled code would draw in ways of its own."""

    def drawn(draw):
        torch.manual_seed(dist.get_rank())
        return draw(torch.ones(3))

    written = lambda x: x * torch.rand(3)
    compiled, plain = (simulate({"data": 2})(drawn, f) for f in (torch.compile(written), written))
    assert all(torch.equal(x, y) for x, y in zip(compiled, plain, strict=True))
    assert not torch.equal(*plain)


def test_sizes_are_numbers_of_ranks():
    for sizes in ({}, {"data": -1}, {"data": 0}, {"data": True}):
        with pytest.raises(ValueError, match="are not the sizes of a mesh; write a positive number of ranks"):
            simulate(sizes)

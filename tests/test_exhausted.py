"""Where memory is not there, the error goes on, and says which class of memory and which unit asked for it."""

from __future__ import annotations

import pytest
import torch

import funczero as fz
from funczero.core.exhausted import held, told

TOO_MUCH = 1 << 45  # values: more than any machine has


def greedy(where):
    """The zoo's step at stage 3 on two ranks' mesh, with an allocation that fails at a place."""

    def asks(name, x):
        return x + torch.empty(TOO_MUCH).sum() if name == where else x

    def loss_fn(params, batch):
        x = asks("outside", batch["x"])
        h = fz.layers(lambda p, h: asks("unit", Greedy.apply(h, where) @ p["w"]), params["blocks"], x)
        return (h**2).sum(), torch.tensor(float(len(x)))

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, where):
            ctx.where = where
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return asks("backward", g) if ctx.where == "backward" else g, None

    grad = fz.value_and_grad(loss_fn, batch=fz.P("data"), units=("blocks",))
    mine = fz.map_leaves(lambda g: asks("transform", g), "blocks", elementwise=True)
    return fz.train_step(*fz.zero(grad, mine, fz.adamw(1e-2), stage=3, accumulate=1), mesh={"data": -1})


def notes(where):
    step = greedy(where)
    state = step.init({"blocks": [{"w": torch.eye(4)} for _ in range(3)]})
    try:
        step(state, step.local_rows({"x": torch.ones(4, 4)}))
    except (RuntimeError, MemoryError) as error:
        return list(error.__notes__)
    return []


SAID = {
    "unit": "out of memory in the forward of unit 'blocks/0'",
    "outside": "out of memory in the forward, outside the units",
    "backward": "out of memory in the backward",
    "transform": "out of memory in map_leaves",
}


@pytest.mark.parametrize("where", SAID)
@pytest.mark.parametrize("size", [1, 2])
def test_who_asked_for_memory_is_said(run_world, where, size):
    for rank, (first, *rest) in enumerate(run_world(size, notes, where)):
        assert first.startswith(SAID[where]), first
        said = [x for x in rest if x.startswith(f"rank {rank} of {size}, step(state, batch) at step 0")]
        assert len(said) == 1 and "parameters 0.0 MiB, adamw 0.0 MiB" in said[0], rest


def gathered():
    """Notes where a gather of a unit finds no memory: its wire asks for too much once it is told to."""
    ask = []

    def pack(x, lengths, key):
        return x + torch.empty(TOO_MUCH).sum() if ask else x.clone()

    wire = fz.Wire(
        "greedy", pack, lambda sent, lengths, dtype: sent.to(dtype), lambda n, dtype: sum(n) * dtype.itemsize
    )

    def loss_fn(params, batch):
        h = fz.layers(lambda p, h: h @ p["w"], params["blocks"], batch["x"])
        return (h**2).sum(), torch.tensor(float(len(h)))

    grad = fz.value_and_grad(loss_fn, batch=fz.P("data"), units=("blocks",))
    step = fz.train_step(fz.shard("data", grad, fz.adamw(1e-2), gather=wire, threshold=0), mesh={"data": -1})
    state = step.init({"blocks": [{"w": torch.eye(4)} for _ in range(3)]})
    ask.append(True)
    try:
        step(state, step.local_rows({"x": torch.ones(4, 4)}))
    except (RuntimeError, MemoryError) as error:
        return list(error.__notes__)
    return []


def test_a_gather_that_finds_no_memory_names_its_unit(run_world):
    for first, *_ in run_world(2, gathered):
        assert first == "out of memory for the gathered parameters of unit 'blocks/0'", first


def test_other_errors_are_as_they_are():
    error = RuntimeError("a shape")
    told(error, lambda: "never")
    held(error, lambda: "never")
    assert not hasattr(error, "__notes__")

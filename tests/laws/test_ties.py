"""A tie is a fact of the model, not of the tree that its values come in; a batch's None is a fact of the batch, not of
the world.
"""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from torch.utils._pytree import tree_map

import funczero as fz
from funczero import P
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

MESH = {"data": -1}


class Tied(nn.Module):
    """A model whose head is its embedding, around two blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def module_loss(model, b):
    nll = nn.functional.cross_entropy(model(b["x"]).flatten(0, 1), b["x"].flatten(), reduction="sum")
    return nll, torch.tensor(float(b["x"].numel()))


def batch(t=0):
    return {"x": torch.randint(11, (8, 5), generator=torch.Generator().manual_seed(t)), "mask": None}


WAYS = {
    "as it came": lambda module, params: params,
    "from a state_dict": lambda module, params: module.state_dict(),
    "through a tree_map": lambda module, params: tree_map(torch.clone, params),
}


def trained(stage, units, remat, *configure):
    """By way of handing over the parameters: bits of two updates, leaves, and what the frozen ones did."""
    out = {}
    for name, way in WAYS.items():
        module = Tied()
        loss_fn, params = fz.stateless(module, module_loss, units=None if units else (), remat=remat)
        step = fz.train_step(
            *fz.zero(fz.value_and_grad(loss_fn, batch=P("data")), *configure, fz.adamw(1e-2), stage=stage), mesh=MESH
        )
        state = step.init(way(module, params))
        for t in range(2):
            state, m = step(state, step.local_rows(batch(t)))
        whole = step.params(state)
        stood = sorted(n for n in whole if torch.equal(whole[n], params[n]))
        out[name] = (
            tree_hash(whole),
            len(state.params.where.structure.leaves),
            whole["head.weight"] is whole["embed.weight"],
            stood,
        )
    return out


def by_stage(*args):
    return [trained(stage, *args) for stage in range(4)]


@pytest.mark.parametrize(
    ("units", "remat"), [pytest.param(False, False, marks=pytest.mark.slow), (True, False), (True, True)]
)
def test_a_tie_survives_any_tree(run_world, units, remat):
    for world in (1, 2):
        for found in zoo.everywhere(run_world, world, by_stage, units, remat):
            assert len({repr(x) for x in found.values()}) == 1 and found["as it came"][1:] == (5, True, []), found


@pytest.mark.parametrize("which", ["head", "embed", "^head.weight$", lambda name: name.startswith("head")])
def test_a_tied_leaf_is_frozen_by_any_of_its_names(which):
    for found in by_stage(True, False, fz.freeze(which)):
        assert all(stood == ["embed.weight", "head.weight"] for *_, stood in found.values())


def test_a_tied_leaf_is_trained_by_any_of_its_names():
    for name in ("head", "embed"):
        module = Tied()
        loss_fn, params = fz.stateless(module, module_loss)
        source = fz.value_and_grad(loss_fn, batch=P("data"), trainable=name)
        step = fz.train_step(*fz.zero(source, fz.sgd(0.1), stage=2), mesh=MESH)
        state, _ = step(step.init(params), batch())
        whole = step.params(state)
        assert {n for n in whole if not torch.equal(whole[n], params[n])} == {"embed.weight", "head.weight"}


def test_a_loss_by_row_keeps_its_ties():
    def rows(p, b):
        return (b["x"].float() @ p["a"] @ p["b"].T).mean()

    rows.ties = {"b": "a"}
    step = fz.train_step(
        fz.value_and_grad(fz.per_row(rows), batch=P("data")), fz.all_reduce("data"), fz.sgd(0.1), mesh=MESH
    )
    assert len(step.init({"a": torch.ones(5, 2), "b": torch.ones(5, 2)}).params.where.structure.leaves) == 1


def test_names_of_one_parameter_with_two_values_are_refused():
    module = Tied()
    loss_fn, params = fz.stateless(module, module_loss)
    step = fz.train_step(fz.value_and_grad(loss_fn, batch=P("data")), fz.all_reduce("data"), fz.sgd(0.1), mesh=MESH)
    with pytest.raises(
        ValueError,
        match=r"init: 'embed.weight' and 'head.weight' are one parameter of the module, but here they differ",
    ):
        step.init(params | {"head.weight": params["head.weight"] + 1})


def nones(micros):
    """Losses of a batch with a None, and of one without, in as many micro-batches on any world."""
    out, k = [], micros // world_size()
    for stage in range(4):
        g = fz.value_and_grad(
            lambda p, b: (
                (b["x"] @ p["w"]).square().sum() if b.get("mask") is None else None,
                torch.tensor(float(len(b["x"]))),
            ),
            batch=P("data"),
        )
        step = fz.train_step(*fz.zero(g, fz.sgd(0.1), stage=stage, accumulate=k), mesh=MESH)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        state = step.init({"w": torch.ones(4, 3)})
        out += [step(state, step.local_rows(b))[1].loss.item() for b in ({"x": x, "mask": None}, {"x": x})]
        assert step.local_rows({"x": x, "mode": "text"})["mode"] == "text"
    return out


@pytest.mark.parametrize("micros", [2, 4])
def test_none_in_a_batch_is_none_on_any_world_and_words_are_whole(run_world, micros):
    assert len({x for world in (1, 2) for x in zoo.everywhere(run_world, world, nones, micros)}) == 1

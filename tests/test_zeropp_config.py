"""ZeRO++ by DeepSpeed's keys: in a chain and in the engine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from engines import Net, config, rows

import funczero as fz
import funczero.deepspeed as deepspeed
from funczero.deepspeed import ConfigError
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

HPZ, QW, QG = {"zero_hpz_partition_size": 2}, {"zero_quantized_weights": True}, {"zero_quantized_gradients": True}
KEYS = {"plain": {}, "hpZ": HPZ, "hpZ, qwZ": HPZ | QW, "hpZ, qwZ, qgZ": HPZ | QW | QG, "qwZ": QW, "qgZ": QG}


def page(keys, precision="fp32", stage=3, k=1):
    c = config(stage, k, precision)
    return c | {"zero_optimization": c["zero_optimization"] | keys | {"stage": stage}}


SAID = {
    "plain": ({"data": 4}, "shard('data',"),
    "hpZ": ({"node": 2, "local": 2}, "shard('local',"),
    "hpZ, qwZ": ({"node": 2, "local": 2}, "shard('node', gather=int8(2048),"),
    "hpZ, qwZ, qgZ": ({"node": 2, "local": 2}, "shard('node', gather=int8(2048), scatter=int4(512),"),
    "qwZ": ({"data": 4}, "shard('data', gather=int8(2048),"),
    "qgZ": ({"data": 4}, "shard('data',"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_make_the_mesh_and_the_wires(name):
    chain, c = fz.from_deepspeed(page(KEYS[name]), zoo.loss_plain, world=4)
    mesh, opening = SAID[name]
    text = str(fz.train_step(*chain, **c.arguments))
    assert c.arguments["mesh"] == mesh and any(line.strip().startswith(opening) for line in text.splitlines()), text
    assert any("rounded where they travel" in n for n in c.notes) == ("qwZ" in name or name == "hpZ, qwZ, qgZ")
    assert any("all ranks are on one host" in n for n in c.notes) == (name == "qgZ")


def test_gradients_are_summed_within_a_host_first(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    chain, c = fz.from_deepspeed(page(QG), zoo.loss_plain, world=8)
    text = str(fz.train_step(*chain, **c.arguments))
    assert c.arguments["mesh"] == {"node": 4, "local": 2} and text.count("scatter=int4(512)") >= 2


def test_what_cannot_be_meant_is_said():
    with pytest.raises(ConfigError, match="zero_hpz_partition_size: groups of 3 ranks do not divide the world of 4"):
        fz.from_deepspeed(page({"zero_hpz_partition_size": 3}), zoo.loss_plain, world=4)
    with pytest.raises(ConfigError, match=r"there are nodes, but axis='data'; write axis=\('node', 'local'\)"):
        fz.from_deepspeed(page(HPZ), zoo.loss_plain, world=4, axis="data")
    c = fz.from_deepspeed(page(HPZ | QW, stage=2), zoo.loss_plain, world=4)[1]
    assert c.arguments["mesh"] == {"data": 4} and any("changes nothing at stage 2" in n for n in c.notes)
    assert fz.from_deepspeed(page({"zero_hpz_partition_size": 64}), zoo.loss_plain, world=4)[1].arguments["mesh"] == {
        "node": 1,
        "local": 4,
    }


def trained(keys, k, updates=4):
    """Losses and masters of an engine."""
    engine, *_ = deepspeed.initialize(model=Net(), config=page(keys, k=k))
    seen = []
    for batch in rows(4 * k * world_size(), updates, k, torch.float32):
        for micro in zoo.split(engine.train_step.local_rows(batch), k):
            loss = F.cross_entropy(engine(micro["x"]).float(), micro["y"])
            engine.backward(loss)
            engine.step()
        seen.append(engine.metrics.loss.item())
    masters = engine.train_step.params(engine.state)
    return seen, tree_hash(masters), masters


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_engine_takes_them(run_world, k):
    losses, first, masters = zip(
        *(run_world(4, trained, KEYS[name], k)[0] for name in ("plain", "hpZ", "hpZ, qwZ, qgZ"))
    )
    assert first[0] == first[1] and losses[0] == losses[1], "where parameters rest changes no value"
    assert first[2] != first[0]
    torch.testing.assert_close(torch.tensor(losses[2]), torch.tensor(losses[0]), rtol=2e-2, atol=2e-2)
    assert max((masters[2][n] - x).abs().max() for n, x in masters[0].items()) < 0.05


def cut_while_built():
    """Masters and views of a module that zero.Init cut over all ranks, where groups of two hold the parameters."""
    out = []
    for enabled in (False, True):
        with deepspeed.zero.Init(enabled=enabled):
            net = Net()
        engine, *_ = deepspeed.initialize(model=net, config=page(HPZ))
        step, state = engine.train_step, engine.state
        out.append((tree_hash(step.params(state)), tree_hash(fz.tree.leaves(step.whole_views(state)))))
    return out


def test_a_module_that_is_cut_while_it_is_built_is_held_by_groups(run_world):
    assert len({found for rank in run_world(4, cut_while_built, timeout=300.0) for found in rank}) == 1


def frozen_views(keys):
    """The whole views of an engine's leaves, beside its masters; `first.weight` does not learn."""
    net = Net()
    net.first.weight.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=net, config=page(keys))
    step, state = engine.train_step, engine.state
    views = step.whole_views(state).leaves()
    names = [leaf.path for leaf in state.params.where.structure.leaves]
    masters = step.params(state)
    return {n: (x - masters[n]).abs().max().item() for n, x in zip(names, views, strict=True)}


FROZEN = {"zero_quantized_nontrainable_weights": True, "stage3_param_persistence_threshold": 0}


@pytest.mark.parametrize("keys", [FROZEN, FROZEN | HPZ], ids=["flat", "hpZ"])
def test_weights_that_do_not_learn_are_rounded_alone(run_world, keys):
    for off in run_world(4, frozen_views, keys):
        assert 0 < off.pop("first.weight") < 0.01 and not any(off.values())
    assert any(
        "do not learn are rounded to int8(2048)" in n for n in fz.from_deepspeed(page(keys), zoo.loss_plain)[1].notes
    )


def test_a_frozen_wire_beside_differences_is_refused():
    parts = fz.zero(zoo.source(), *zoo.tx(), stage=2, gather=fz.difference(fz.int4()), frozen=fz.int8())
    with pytest.raises(fz.ChainError, match=r"frozen=int8\(2048\) over 'data': views that do not learn are sent once"):
        fz.train_step(*parts, mesh={"data": 2})

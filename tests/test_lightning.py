"""Lightning's Trainer and Fabric over engines: plain torch's losses at every stage, killed and resumed elsewhere."""

from __future__ import annotations

import importlib.util
import math
from functools import cache

import lightnings
import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
FAST = (2, 2), (3, 2)
SLOW = [(s, w) for s in range(4) for w in (1, 2) if (s, w) not in FAST]
EVERYWHERE = [*FAST, *(pytest.param(*at, marks=pytest.mark.slow) for at in SLOW)]
NOT_HERE = [pytest.param(*at, marks=pytest.mark.slow) for at in (*FAST, *SLOW)]
TIME = 300.0  # the first import of lightning takes a minute where everybody imports
truth = cache(lightnings.by_hand)


def furthest(got, want):
    assert len(got) == len(want)
    return max(abs(a / b - 1) for a, b in zip(got, want, strict=True))


def same_weights(path, net):
    """Whole weights as plain Lightning saves them. A key's bias has no gradient but rounding."""
    saved = torch.load(path)["state_dict"]
    assert list(saved) == [f"net.{n}" for n in net.state_dict()]
    for n, x in net.state_dict().items():
        rows = slice(8) if n.endswith("qkv.bias") else slice(None)
        torch.testing.assert_close(saved[f"net.{n}"][rows], x[rows], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("stage", "world"), EVERYWHERE)
def test_a_fit_is_plain_torchs_and_goes_on_elsewhere(run_world, tmp_path, stage, world):
    """A clip, accumulation, two groups and a schedule; a checkpoint goes on at another stage and world."""
    losses, norms, net = truth()
    got = run_world(world, lightnings.fit, stage, str(tmp_path), timeout=TIME)[0]
    assert furthest(got["losses"], losses) < 1e-6 and abs(got["norm"] / norms[-1] - 1) < 1e-6
    assert got["lr"] == [g["lr"] for g in _rates()]
    assert got["validate"] == got["test"] and len(got["predict"]) == 2
    last = got["validated"][-2:]
    assert math.isclose(sum(last) / 2, got["validate"], rel_tol=1e-6)
    assert (got["held"] < 800) == (stage > 0 and world == 2)
    same_weights(tmp_path / "last.ckpt", net)
    other = {(2, 2): (3, 2), (3, 2): (2, 2)}.get((stage, world), (3 - stage, 3 - world))
    again = run_world(other[1], lightnings.fit, other[0], str(tmp_path), f"{tmp_path}/epoch=0.ckpt", timeout=TIME)[0]
    assert furthest(again["losses"], losses[6:]) < 1e-6 and again["validate"] == pytest.approx(
        got["validate"], rel=1e-6
    )


def _rates():
    o, schedule = lightnings.optimizer_of(lightnings.GPT().parameters())
    for _ in range(6):
        o.step()
        schedule.step()
    return o.param_groups


@pytest.mark.parametrize(("stage", "world"), EVERYWHERE)
def test_a_gan_is_plain_torchs(run_world, tmp_path, stage, world):
    """Two optimizers by hand; without toggling, gradients that the other's loss leaves behind count as in torch."""
    for order, toggle in (("before", False), ("after", False), ("after", True)):
        want, nets = lightnings.gan_by_hand("before" if toggle else order)
        got, steps = run_world(world, lightnings.gan_fit, stage, str(tmp_path), order, toggle, timeout=TIME)[0]
        assert furthest(got, want) < 1e-6 and steps == 12
        saved = torch.load(tmp_path / "gan.ckpt")["state_dict"]
        for name, x in ((f"{k}.{n}", x) for k in "gd" for n, x in nets[k].items()):
            torch.testing.assert_close(saved[name], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("stage", "world"), EVERYWHERE)
def test_fabric_is_plain_torchs_and_goes_on_elsewhere(run_world, tmp_path, stage, world):
    """Two modules with their optimizers, schedulers made over the wrapped ones; a load at another stage and world."""
    want, _ = lightnings.gan_by_hand()
    got = run_world(world, lightnings.fabric_gan, stage, str(tmp_path), timeout=TIME)[0]
    assert furthest(got, want) < 1e-6
    other = (3 - stage, 2) if (stage, world) in FAST else (3 - stage, 3 - world)
    again = run_world(other[1], lightnings.fabric_gan, other[0], str(tmp_path), f"{tmp_path}/half.ckpt", timeout=TIME)[
        0
    ]
    assert furthest(again, want[6:]) < 1e-6


SAID = {
    "raw": (
        "SGD.step: a strategy has taken this optimizer over, so it would find no gradient and do nothing; step self."
    ),
    "clipped": (
        "backward: it comes after clip_gradients, and in torch this gradient would be added to a clipped one, and"
    ),
    "backward": "FunczeroStrategy: Backward.backward is overridden, but gradients are not written into .grad",
    "nothing": "configure_optimizers returned None, so nothing that the strategy knows of would be trained; return the",
    "shared": "optimizers 0 and 1 both have parameter 'net.blocks.0.norm.weight', and its gradient can only be one",
    "mixed": "optimizer 0 has 'net.blocks.0.qkv.weight' but not all parameters of 'net.blocks.0.qkv', and at stage 3",
    "direct": (
        "has a .grad, so loss.backward() was called directly and nothing here has heard of it; write self.manual_b"
    ),
    "kept": (
        "a backward came after the last step() and before zero_grad(), so that in plain torch the gradient that was"
    ),
    "normed": (
        "grad_norm: gradients of an engine's parameters are the chain's, not .grad, so it would find none; read str"
    ),
    "unfrozen": "the groups are fixed once the strategy is set up, so callbacks that unfreeze later (BaseFinetuning)",
    "swa": (
        "callback StochasticWeightAveraging: it writes averages into parameters whose masters are the chain's; leave"
    ),
    "averaged": (
        "callback WeightAveraging: it swaps averages with parameters whose masters are the chain's; leave it out"
    ),
    "sync_batchnorm": (
        "sync_batchnorm: sums of batch norms over ranks inside a forward have not been tried here; leave it"
    ),
    "64-true": "precision='64-true': masters are float32 here; write one of 32-true, bf16-mixed, 16-mixed, bf16-true,",
    "uneven": (
        "predict: rank 0 has [5] batches and rank 1 has [4], but all ranks compute together (stage 3); deal as many"
    ),
}


WRITTEN = {
    1: (
        "parameter 'net.wte.weight' was written to since the last update, but the master did not hear of it; write"
        " inside"
    ),
    3: "parameter 'net.wte.weight' is sharded (stage 3) and has no values here",
}


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_what_cannot_be_right_is_refused_by_name(run_world, stage):
    for said in run_world(2, lightnings.refused, stage, timeout=TIME):
        for name, words in {**SAID, "written": WRITTEN[stage]}.items():
            if stage == 3 or name not in ("mixed", "uneven"):
                assert words in said[name], (name, said[name])


KINDS = "bf16-mixed", "16-mixed", "16-mixed with a scaler", "clip by value", "a short window", "configure_model"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [*FAST, *SLOW])
def test_other_ways_are_those_of_lightnings_own_strategy(run_world, stage, world):
    for kind in KINDS:
        mine, theirs = run_world(world, lightnings.beside, stage, kind, timeout=TIME)[0]
        assert furthest(mine, theirs) < 1e-6, kind
    mine, theirs = run_world(world, lightnings.normed, stage, timeout=TIME)[0]
    assert furthest(mine, theirs) < 1e-5
    gaps = run_world(world, lightnings.demos, stage, timeout=TIME)[0]
    assert len(gaps) == 3 and max(gaps.values()) < 1e-6


@pytest.mark.parametrize(
    "worlds",
    [{1: (0,), 2: (2, 3)}, pytest.param({1: (1, 2, 3), 2: (0, 1), 4: (2, 3)}, marks=pytest.mark.slow)],
    ids=str,
)
def test_exact_sums_have_one_hash_whatever_the_world(run_world, tmp_path, worlds):
    found = [run_world(w, lightnings.exact, stages, str(tmp_path), timeout=TIME)[0] for w, stages in worlds.items()]
    (trainer,), (fabric,) = (set(x) for x in zip(*(both for rank in found for both in rank.values()), strict=True))
    assert trainer != fabric


def test_sums_are_refused_by_name():
    from funczero.lightning import FabricStrategy, FunczeroStrategy

    for strategy in (FabricStrategy, FunczeroStrategy):
        with pytest.raises(ValueError, match="sums='integer' is none of tree, exact, backend; write one of them"):
            strategy(sums="integer")


def test_strategies_are_found_by_name():
    import lightning as L

    from funczero.lightning import FabricStrategy, FunczeroStrategy

    for stage, name in [(2, "funczero"), *((s, f"funczero_stage_{s}") for s in range(4))]:
        trainer = L.Trainer(strategy=name, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        fabric = L.Fabric(strategy=name, accelerator="cpu", devices=1)
        for strategy, kind in ((trainer.strategy, FunczeroStrategy), (fabric.strategy, FabricStrategy)):
            assert type(strategy) is kind and strategy.settings.stage == stage


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_module_on_meta_gets_one_start_at_every_stage(run_world, world):
    runs = [run_world(world, lightnings.late_on_meta, s, timeout=TIME)[0] for s in range(4)]
    assert all(tied for _, tied in runs) and all(furthest(losses, runs[0][0]) < 1e-6 for losses, _ in runs)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [*FAST, *SLOW])
def test_half_precision_has_float32_masters(run_world, stage, world):
    """bf16-true: a bfloat16 copy computes, as under DeepSpeed; plain Lightning would update in bfloat16."""
    mine, theirs = run_world(world, lightnings.beside, stage, "bf16-true", timeout=TIME)[0]
    want, _, _ = lightnings.by_hand(clip=0, k=1, half=torch.bfloat16)
    assert furthest(mine[:6], want) < 2e-2 and furthest(mine, theirs) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [*FAST, *SLOW])
def test_a_killed_trainer_goes_on_at_another_world(tmp_path, stage, world):
    from test_loops import start, told

    losses, norms, net = truth()
    folder = tmp_path / "lit"
    killed = told(start("lit", stage, folder, world, "killed", "trainer"), folder, killed=True)["killed"]
    got = told(start("lit", 3 - stage, folder, 3 - world, "resumed", "trainer"), folder)["resumed"]
    assert furthest(killed, losses[:8]) < 1e-6 and furthest(got["losses"], losses[6:]) < 1e-6
    assert abs(got["norm"] / norms[-1] - 1) < 1e-6
    same_weights(folder / "last.ckpt", net)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [*FAST, *SLOW])
def test_a_killed_fabric_goes_on_at_another_world(tmp_path, stage, world):
    from test_loops import start, told

    losses, _ = lightnings.gan_by_hand("before")
    folder = tmp_path / "lit"
    killed = told(start("lit", stage, folder, world, "killed", "fabric"), folder, killed=True)["killed"]
    got = told(start("lit", 3 - stage, folder, 3 - world, "resumed", "fabric"), folder)["resumed"]
    assert furthest(killed, losses[:10]) < 1e-6 and furthest(got, losses[6:]) < 1e-6

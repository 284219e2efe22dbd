"""DeepSpeed's optimizers of whole leaves: Lamb in engines and chains, Muon in chains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from engines import Net, config, rows

import funczero as fz
import funczero.deepspeed as deepspeed
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

LAMB = {"optimizer": {"type": "Lamb", "params": {"lr": 1e-2, "weight_decay": 0.1, "max_coeff": 2.0}}}
MUON = {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.01, "adam_lr": 1e-3}}}


def engines():
    """By stage, one hash of what an engine with Lamb has trained."""
    out = []
    for stage in range(4):
        k = 4 // world_size()
        engine, *_ = deepspeed.initialize(model=Net(), config=config(stage, k, micro=2, **LAMB))
        for batch in rows(8, 3, k, torch.float32):
            for micro in zoo.split(engine.train_step.local_rows(batch), k):
                engine.backward(F.cross_entropy(engine(micro["x"]), micro["y"]))
                engine.step()
        out.append(tree_hash(engine.train_step.params(engine.state)))
    return out


def test_lamb_in_an_engine_has_one_hash_at_every_stage_and_world(run_world):
    want = set(zoo.everywhere(run_world, 1, engines))
    assert len(want) == 1 and set(zoo.everywhere(run_world, 2, engines)) == want


def chain_of(keys, stage):
    page = {"train_batch_size": 24, "gradient_accumulation_steps": 8, "zero_optimization": {"stage": stage}, **keys}
    chain, c = fz.from_deepspeed(page, zoo.loss_plain, world=1, units=("blocks",))
    masters, _, state, _ = zoo.train(chain, **c.arguments, updates=2)
    return tree_hash(masters), state


def test_muon_is_muon_for_matrices_and_adamw_for_embeddings_heads_and_the_rest():
    found = [chain_of(MUON, stage) for stage in range(4)]
    assert len({h for h, _ in found}) == 1
    own = found[0][1].chain
    assert (own["muon"].rates["lr"], own["adamw"].rates["lr"]) == (0.01, 1e-3)
    structure = own["muon"].mu.where.structure
    assert {x.path for i, x in enumerate(structure.leaves) if not structure.frozen(i)} == {
        "conv",
        "empty",
        "head/w",
        *(f"blocks/{i}/{n}" for i in range(3) for n in "wv"),
    }


@pytest.mark.parametrize(
    ("given", "rates"), [({}, (0.02, 3e-4)), ({"lr": 0.1}, (0.1, 0.1)), ({"lr": 0.1, "adam_lr": 0.2}, (0.1, 0.2))]
)
def test_muons_rates_are_lr_for_both_unless_one_is_given(given, rates):
    own = chain_of({"optimizer": {"type": "muon", "params": given}}, 0)[1].chain
    assert (float(own["muon"].rates["lr"]), float(own["adamw"].rates["lr"])) == rates


def test_muon_in_an_engine_is_refused_by_name():
    with pytest.raises(deepspeed.ConfigError, match="optimizer.type: it is Muon for matrices and AdamW for the rest"):
        deepspeed.initialize(model=Net(), config=config(1, **MUON))


def test_a_scheduler_and_two_rates_contradict_each_other():
    page = {"train_batch_size": 8, "scheduler": {"type": "WarmupLR"}, "gradient_accumulation_steps": 1}
    both = {"type": "Muon", "params": {"lr": 0.1, "muon_lr": 0.2}}
    with pytest.raises(fz.deepspeed.ConfigError, match="the scheduler writes one rate for both halves; delete muon_lr"):
        fz.from_deepspeed({**page, "optimizer": both}, zoo.loss_plain, world=1)

"""gradients/lora.py and checkpoint/adapters.py: adapters of modules and trees, and PEFT's files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import funczero as fz
from funczero import P
from funczero.testing import simulate, tree_hash

ADAPTERS = fz.lora(rank=2, match="c_attn|c_fc|lm_head", alpha=3)


def gpt2(tied=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8, tie_word_embeddings=tied, resid_pdrop=0.0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def loss(model, tokens):
    logits = model(tokens[:, :-1], use_cache=False).logits.flatten(0, 1)
    labels = tokens[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum"), torch.tensor(float(len(labels)))


def words(t):
    return torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(t))


def trained(stage=3, updates=2):
    """(model with adapters, its parameters after some updates)."""
    model = ADAPTERS.module(gpt2())
    loss_fn, params = fz.stateless(model, loss)
    grad = fz.value_and_grad(loss_fn, batch=P("data"), trainable=loss_fn.trainable)
    step = fz.train_step(*fz.zero(grad, fz.adamw(1e-1), stage=stage, accumulate=2), mesh={"data": 1})
    state = step.init(params)
    for t in range(updates):
        state, _ = step(state, step.local_rows(words(t)))
    return model, step.params(state), loss_fn


def test_a_saved_file_loads_in_peft_and_gives_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    model, params, _ = trained()
    folder = fz.save_adapters(tmp_path / "adapters", ADAPTERS, model, params, base="gpt2", task="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(gpt2(), folder).eval()
    own = torch.func.functional_call(model, params, (words(9),)).logits
    torch.testing.assert_close(theirs(words(9)).logits, own, rtol=0, atol=0)
    merged = gpt2()
    merged.load_state_dict(ADAPTERS.merged(params, model), strict=True)
    torch.testing.assert_close(merged(words(9)).logits, own)
    assert (merged(words(9)).logits - gpt2()(words(9)).logits).abs().max() > 1e-3


def test_a_file_of_peft_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules="|".join(["c_attn", ".*c_attn", ".*c_fc", "lm_head"]))
    theirs = peft.get_peft_model(gpt2(), config).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_B" in n:
                p.normal_(generator=torch.Generator().manual_seed(len(n)))
    theirs.save_pretrained(tmp_path)
    model = ADAPTERS.module(gpt2())
    params = fz.load_adapters(tmp_path, ADAPTERS, dict(model.named_parameters()))
    assert torch.equal(torch.func.functional_call(model, params, (words(9),)).logits, theirs(words(9)).logits)


def test_the_given_module_stays_as_it_is_and_weights_are_shared():
    module = gpt2()
    before = {n: (p.data_ptr(), p.requires_grad) for n, p in module.named_parameters()}
    model = ADAPTERS.module(module)
    assert {n: (p.data_ptr(), p.requires_grad) for n, p in module.named_parameters()} == before
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning and all(ADAPTERS.trainable(n) for n in learning)
    shared = dict(model.named_parameters())["transformer.h.0.attn.c_attn.base_layer.weight"]
    assert shared.data_ptr() == module.transformer.h[0].attn.c_attn.weight.data_ptr()
    assert torch.equal(model(words(0)).logits, module(words(0)).logits)
    assert tree_hash(dict(ADAPTERS.module(module).named_parameters())) == tree_hash(dict(model.named_parameters()))


TREE = fz.lora(rank=1, match="w", alpha=2)


def of_a_tree(stage):
    """Stacked and plain matrices, in units and outside them."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64) / 2
    params = TREE.init({"w": new(4, 6), "blocks": [{"w": new(6, 6), "b": new(6)} for _ in range(3)]}, key=1)
    block = lambda p, x: x + torch.tanh(x @ (p := TREE.merged(p))["w"] + p["b"])

    def loss_fn(p, batch):
        x = fz.layers(block, p["blocks"], batch @ TREE.merged(p["w"]))
        return (x**2).sum(), torch.tensor(float(len(batch)))

    grad = fz.value_and_grad(loss_fn, batch=P("data"), units=("blocks",), trainable=TREE.trainable)
    step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=stage), mesh={"data": -1}, policy="float64")
    state = step.init(params)
    for _ in range(2):
        state, _ = step(state, step.local_rows(torch.ones(4, 4, dtype=torch.float64)))
    return tree_hash(step.params(state)), tree_hash(TREE.merged(step.params(state)))


def test_a_tree_with_units_at_every_stage():
    found = {of for stage in range(4) for of in simulate({"data": 2})(of_a_tree, stage)}
    assert len(found) == 1 and len(next(iter(found))) == 2


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: fz.lora(0, "w"), ValueError, "lora: rank=0 is no rank"),
        (lambda: fz.lora(1, "("), ValueError, r"lora: match='\(' is no regex"),
        (lambda: fz.lora(1, "w", dropout=1.0), ValueError, "lora: dropout=1.0"),
        (lambda: fz.lora(1, "v").init({"w": torch.ones(2, 2)}), ValueError, "'v' is found in no path; they are"),
        (lambda: fz.lora(1, "w").init({"w": torch.ones(2)}), TypeError, r"'w' has shape \(2,\) and is no matrix"),
        (lambda: fz.lora(1, "x").module(nn.Linear(1, 1)), ValueError, "'x' is found in no path of a layer"),
        (
            lambda: fz.lora(1, "0").module(nn.Sequential(nn.Conv2d(1, 1, 1))),
            TypeError,
            "'0' is a Conv2d, but adapters are for",
        ),
    ],
    ids=["rank", "regex", "dropout", "no_path", "no_matrix", "no_layer", "conv"],
)
def test_what_cannot_be_adapted_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_tied_weight_is_not_merged():
    model = ADAPTERS.module(gpt2(tied=True))
    params = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(ValueError, match="'lm_head' shares its weight with 'transformer.wte.weight'"):
        ADAPTERS.merged(params, model)


def test_files_of_other_adapters_are_refused(tmp_path):
    model, params, _ = trained(updates=0)
    fz.save_adapters(tmp_path, ADAPTERS, model, params)
    other = fz.lora(4, "c_attn")
    with pytest.raises(fz.CheckpointError, match="says r=2, but these adapters have 4"):
        fz.load_adapters(tmp_path, other, params)
    fewer = fz.lora(2, "c_attn", alpha=3).module(gpt2())
    with pytest.raises(fz.CheckpointError, match="is not in the parameters; write fz.lora with the file's match"):
        fz.load_adapters(tmp_path, ADAPTERS, dict(fewer.named_parameters()))
    with pytest.raises(ValueError, match="save_adapters: the parameters are not those of this module"):
        fz.save_adapters(tmp_path, ADAPTERS, fewer, params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(fz.CheckpointError, match="says use_dora=True"):
        fz.load_adapters(tmp_path, ADAPTERS, params)
    with pytest.raises(fz.CheckpointError, match="cannot be read"):
        fz.load_adapters(tmp_path / "no", ADAPTERS, params)

"""Modules that were not written for this: recurrent, parametrized, nested, and models of Hugging Face."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from modules import DIM, TIME, build, far, got, look
from torch import nn

from funczero.gradients.stateless import stateless


def hf_loss(model, b):
    """Every row weighs one."""
    out = model(**{k: v for k, v in b.items() if k != "labels"}).logits
    return F.cross_entropy(out.flatten(0, 1), b["labels"].flatten(), reduction="none").sum(), torch.tensor(
        float(b["labels"].numel())
    )


# --- odd modules ------------------------------------------------------------------------------------------------------
def _zoo():
    """Modules with what goes wrong easily: name -> (module, loss, batch, keyword arguments of stateless)."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, TIME, DIM, dtype=torch.float64, generator=g)

    def sums(model, b):
        out = model(b)
        return (out[0] if isinstance(out, tuple) else out).square().sum(), torch.tensor(float(len(b)))

    lstm = nn.LSTM(DIM, DIM, num_layers=2, batch_first=True)
    norm = nn.utils.parametrizations.weight_norm(nn.Linear(DIM, DIM))
    stack = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(DIM, 2, 8, dropout=0.0, batch_first=True), 3, enable_nested_tensor=False
    )
    return {
        "lstm": (lstm, sums, x, {}),
        "parametrized": (nn.Sequential(norm, nn.ReLU()), sums, x, {}),
        "encoder": (stack, sums, x, {}),
        "encoder remat": (stack, sums, x, {"remat": True}),
        "named units": (Walk(), sums, x, {"units": "steps"}),
        "named units remat": (Walk(), sums, x, {"units": "steps", "remat": True}),
    }


class Walk(nn.Module):
    """A dict of recurrent layers that give tuples; one's state goes to the next, and a dict is filled on the way."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleDict({"a": nn.LSTM(DIM, DIM, batch_first=True), "b": nn.LSTM(DIM, DIM, batch_first=True)})

    def forward(self, x):
        x, state = self.steps["a"](x)
        return self.steps["b"](x, state)[0] + state[1][-1][:, None]


def _zoo_gradients():
    out = {}
    for name in _zoo():
        module, loss, b, kw = build(lambda name=name: Wrapped(*_zoo()[name]), torch.float64).unwrap()
        loss_fn, params = stateless(module, loss, **kw)
        out[name] = (loss_fn.units, far(module, loss, b, got(loss_fn, params, b, 3)))
    return out


class Wrapped(nn.Module):
    """A module with its loss, so that build can seed and cast it."""

    def __init__(self, module, *rest):
        super().__init__()
        self.module, self.rest = module, rest

    def unwrap(self):
        """What was wrapped."""
        return self.module, *self.rest


def test_odd_modules(run_world):
    for result in run_world(2, _zoo_gradients):
        assert max(d for _, d in result.values()) < 1e-12, result
        assert (
            result["encoder"][0] == ("layers",) and result["named units"][0] == ("steps",) and result["lstm"][0] == ()
        )


# --- models from elsewhere --------------------------------------------------------------------------------------------
def _models():
    t = pytest.importorskip("transformers")
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32)
    tokens = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < torch.tensor([8, 5, 7, 3])[:, None]).long()
    plain, masked = {"input_ids": tokens, "labels": tokens}, {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens,
    }
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return {
        "gpt2": (
            t.GPT2LMHeadModel,
            t.GPT2Config(
                n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0, **off
            ),
            plain,
            1,
        ),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**small, num_key_value_heads=1), masked, 1),
        "bert": (
            t.BertForMaskedLM,
            t.BertConfig(**small, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            masked,
            1,
        ),
        "t5": (
            t.T5ForConditionalGeneration,
            t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32, dropout_rate=0.0),
            {**masked, "decoder_input_ids": tokens},
            2,
        ),
    }


def _hugging(name, ask):
    make, config, b, lists = _models()[name]
    module = build(lambda: make(config), torch.float64).train()
    if ask:
        module.gradient_checkpointing_enable()
    before = look(module)
    loss_fn, params = stateless(module, hf_loss)
    result = got(loss_fn, params, b, 3)
    assert len(loss_fn.units) == lists and look(module) == before
    return far(module, hf_loss, b, result)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_hugging_face_models(run_world, name):
    pytest.importorskip("transformers")
    for ask in (False, True):
        for difference in run_world(2, _hugging, name, ask):
            assert difference < 1e-12

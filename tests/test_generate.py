"""step/generate.py: the tokens of plain torch at every stage and world, ranks that end together, and draws by row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cover import EACH
from modules import Net, build
from modules import loss as net_loss
from torch import nn

import funczero as fz
from funczero import P
from funczero.gradients.tape import Tape
from funczero.testing import simulate

UNITS, ONCE = 0, 1 << 20  # whole=
SEQ = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
SEQ |= {"decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 40, "max_position_embeddings": 32}


def model(name="gpt2"):
    """Of Hugging Face, tiny, with weights so large that texts are not one token; in training, with its dropout."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "bart":
            out = transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ))
        else:
            sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 32, "pad_token_id": 0}
            out = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for p in out.parameters():
            p.mul_(4)
    return out.train()


def loss(model, tokens):
    logits = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"), torch.tensor(1.0)


def started(module, stage, loss=loss, rng=True, policy=None):
    loss_fn, params = fz.stateless(module, loss)
    grad = fz.value_and_grad(loss_fn, batch=P("data"), rng=rng)
    step = fz.train_step(*fz.zero(grad, fz.adamw(1e-2), stage=stage), mesh={"data": -1}, policy=policy)
    return step, step.init(params)


def words(rows, time=5, seed=1):
    return torch.randint(3, 40, (rows, time), generator=torch.Generator().manual_seed(seed))


def mine(x):
    """A rank's of a list of prompts in neighbouring parts, the first rank three of four."""
    if torch.distributed.get_world_size() == 1:
        return x
    return x[:3] if torch.distributed.get_rank() == 0 else x[3:]


# --- a model's own loop -----------------------------------------------------------------------------------------------
SAMPLED = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "key": 5}


def own(stages):
    """As one rank: by question, the texts; those that plain torch has are compared here."""
    out, rank = {}, torch.distributed.get_rank()
    for stage in stages:
        step, state = started(module := model(), stage)
        plain = model().eval()
        for whole in (UNITS, ONCE) if stage == 3 else (UNITS,):
            ask = partial(fz.generate, step, state, module, whole=whole)
            out[stage, whole, "greedy"] = ask(mine(words(4)), max_new_tokens=9, do_sample=False)
            out[stage, whole, "drawn"] = ask(mine(words(4)), **SAMPLED)
            # ranks of other lengths, numbers of prompts and new tokens; the last one has none
            long = ask(words(rank + 1, 4 + 3 * rank), max_new_tokens=2 + 9 * rank, do_sample=False)
            want = plain.generate(words(rank + 1, 4 + 3 * rank), max_new_tokens=2 + 9 * rank, do_sample=False)
            assert torch.equal(long, want), (stage, whole)
            none = ask(words(2) if rank == 0 else None, max_new_tokens=4, do_sample=False)
            assert (none is None) if rank else torch.equal(none, plain.generate(words(2), max_new_tokens=4))
        assert module.training
    return out


@EACH
def test_a_models_own_loop_has_one_text_whatever_the_world(run_world, whole):
    want = model().eval().generate(words(4), max_new_tokens=9, do_sample=False)
    (one,) = run_world(1, own, (0, 3) if whole else (1,))
    two = run_world(2, own, (0, 1, 2, 3) if whole else (0, 3))
    greedy = [x for (*_, what), x in one.items() if what == "greedy"]
    drawn = [x for (*_, what), x in one.items() if what == "drawn"]
    for question in two[0]:
        both = torch.cat([rank[question] for rank in two])
        (greedy if question[-1] == "greedy" else drawn).append(both)
    assert all(torch.equal(x, want) for x in greedy)
    assert all(torch.equal(x, drawn[0]) for x in drawn) and not torch.equal(drawn[0], want)


def beams(stage):
    """An encoder and a decoder, beams, a mask, several texts a prompt; ranks that need other passes of both."""
    rank, module = torch.distributed.get_rank(), model("bart")
    step, state = started(module, stage)
    ids = words(2 - rank, 4 + rank)
    given = {"input_ids": ids, "attention_mask": (ids > 8).long()}
    how = {"max_new_tokens": 6 - 3 * rank, "do_sample": False}
    more = how | {"num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    found = fz.generate(step, state, module, given, whole=UNITS, **more)
    want = model("bart").eval().generate(**given, **more)
    torch.testing.assert_close(found.sequences_scores, want.sequences_scores, rtol=0, atol=0)
    assert torch.equal(found.sequences, want.sequences)
    three = how | {"do_sample": True, "num_return_sequences": 3, "key": fz.rng.row_keys(7, len(ids), start=2 * rank)}
    texts = fz.generate(step, state, module, given, whole=UNITS, **three)
    assert len(texts) == 3 * len(ids) and len({tuple(x.tolist()) for x in texts}) > len(ids)


def test_beams_of_an_encoder_and_a_decoder(run_world):
    run_world(2, beams, 3)


# --- the plain loop ---------------------------------------------------------------------------------------------------
def logits(params, tokens):
    """A causal model: means over the text so far."""
    x = params["embed"][tokens].cumsum(1)
    return fz.layers(lambda p, x: x + torch.tanh(x @ p["w"]), params["blocks"], x) @ params["embed"].T


def tree():
    g = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return {"embed": normal(11, 6), "blocks": [{"w": normal(6, 6)} for _ in range(3)]}


PROMPTS = [torch.tensor(x) for x in ([1, 2, 3], [4], [5, 6, 7], [8, 9])]


def plain(stage, whole, how):
    grad = fz.value_and_grad(lambda p, b: (logits(p, b).sum(), torch.tensor(1.0)), batch=P("data"), units=("blocks",))
    step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=stage), mesh={"data": -1}, policy="float64")
    state = step.init(tree())
    texts = fz.generate(step, state, logits, mine(PROMPTS), whole=whole, max_new_tokens=8, eos_token_id=0, **how)
    if torch.distributed.get_rank() == 1:  # without prompts
        assert fz.generate(step, state, logits, [], whole=whole, max_new_tokens=3) == []
    else:
        fz.generate(step, state, logits, PROMPTS[:1], whole=whole, max_new_tokens=3)
    return [x.tolist() for x in texts]


def by_hand(prompt):
    text = list(prompt.tolist())
    while len(text) < len(prompt) + 8 and text[-1] != 0:
        text.append(int(logits(tree(), torch.tensor([text]))[0, -1].argmax()))
    return text


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "key": 3, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_a_function_has_one_text_whatever_the_world(how):
    found = [
        [x for rank in simulate({"data": world})(plain, stage, whole, how) for x in rank]
        for world, stage, whole in ((1, 0, UNITS), (1, 3, UNITS), (2, 1, UNITS), (2, 2, ONCE), (2, 3, UNITS))
    ]
    assert all(x == found[0] for x in found)
    assert how or found[0] == [by_hand(x) for x in PROMPTS]


def module(stage):
    net = build(Net, torch.float64)
    step, state = started(net, stage, net_loss, rng=False, policy="float64")
    found = fz.generate(step, state, net, torch.tensor([[1, 2], [3, 4]]), whole=UNITS, max_new_tokens=4)
    text = torch.tensor([[1, 2], [3, 4]])
    for _ in range(4):
        text = torch.cat([text, net(text)[:, -1:].argmax(-1)], 1)
    return torch.equal(torch.stack(found), text)


def test_a_module_without_a_loop_of_its_own():
    assert all(simulate({"data": 2})(module, 3))


def test_memory_is_two_units_or_the_whole(monkeypatch):
    tapes, made = [], Tape.__init__

    def noted(self, *args, **kwargs):
        made(self, *args, **kwargs)
        tapes.append(self)

    monkeypatch.setattr(Tape, "__init__", noted)
    simulate({"data": 2})(plain, 3, UNITS, {})
    assert tapes and all(t.seam and t.gathers.peak <= 2 and t.gathers.live == 0 for t in tapes)


# --- draws ------------------------------------------------------------------------------------------------------------
def test_draws_follow_the_probabilities_and_the_masks_are_transformers():
    from funczero.step.sampling import drawn, probabilities, sampling

    transformers = pytest.importorskip("transformers")
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 3
    want = scores
    for theirs in (
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.8),
    ):
        want = theirs(None, want)
    p = probabilities(scores, sampling(1, True, temperature=0.7, top_k=20, top_p=0.8))
    torch.testing.assert_close(p, want.softmax(-1))
    few = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).expand(20_000, 4)
    found = torch.bincount(drawn(few, fz.rng.row_keys(0, 20_000), 3), minlength=4) / 20_000
    torch.testing.assert_close(found, few[0], rtol=0, atol=0.015)
    assert found[1] == 0
    with pytest.raises(RuntimeError, match="hold inf, nan or a negative value"):
        drawn(torch.tensor([[0.5, torch.nan]]), fz.rng.row_keys(0, 1), 0)


# --- refusals ---------------------------------------------------------------------------------------------------------
def writes(params, tokens):
    params["embed"].add_(1)
    return logits(params, tokens)


def draws(params, tokens):
    return logits(params, tokens) + torch.randn(())


REFUSED = {
    "prompts": ({"prompts": "text"}, TypeError, "prompts are a string; give int64"),
    "prompt": ({"prompts": [torch.tensor([1]), torch.ones(2)]}, TypeError, "prompt 1 is a tensor; give int64"),
    "empty": ({"prompts": [torch.tensor([], dtype=torch.int64)]}, TypeError, "with a token each"),
    "model": ({"model": 3}, TypeError, "the model is an int; give a module"),
    "option": ({"num_beams": 2}, TypeError, "the plain loop knows no option 'num_beams'"),
    "missing": ({"max_new_tokens": None}, TypeError, "max_new_tokens=None is a missing value"),
    "idle": ({"top_k": 3}, ValueError, "top_k=3 shapes draws, and nothing is drawn; write do_sample=True"),
    "top_p": ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p=1.5 is no probability"),
    "key": ({"do_sample": True}, ValueError, "no key says what is drawn; write key=0"),
    "keys": ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, r"key is torch.int64 of shape \(3,\), but there"),
    "whole": ({"whole": -1}, ValueError, "whole=-1 is below 0"),
    "module": ({"model": nn.Linear(2, 2)}, ValueError, "has no parameter 'bias'; give the module of"),
    "shape": ({"model": lambda p, x: x}, ValueError, r"its logits have shape \(1, 1\)"),
    "written": ({"model": writes}, RuntimeError, "the loss writes into parameter 'embed' in place"),
    "drew": ({"model": draws}, RuntimeError, "draws from torch's global generator, and no row's key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    given, error, words = REFUSED[name]
    grad = fz.value_and_grad(lambda p, b: (logits(p, b).sum(), torch.tensor(1.0)))
    step = fz.train_step(grad, fz.sgd(0.1), policy="float64")
    state = step.init(tree())
    given = {"model": logits, "prompts": torch.tensor([[1]]), "max_new_tokens": 2} | given
    with pytest.raises(error, match=words):
        fz.generate(step, state, **given)


def test_a_models_own_loop_is_refused_where_draws_have_no_row():
    step, state = started(module := model(), 0)
    for more, words in (
        ({}, "the model draws from torch's global generator, but no key says what; write key=0"),
        ({"key": 1, "num_beams": 2}, "the model draws 4 tokens at a time"),
        ({"key": 1, "synced_gpus": True}, "synced_gpus=True is not taken"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=words):
            fz.generate(step, state, module, torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=True, **more)

"""transforms/average.py and project.py: what is done to new parameters, and the average that is kept of them."""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH

import funczero as fz
from funczero import P
from funczero.testing import tree_hash

RIGHT = (fz.clip_by_global_norm(zoo.CLIP), fz.adamw(1e-2))
CLAMPED = fz.project(lambda w: w.clamp(-0.15, 0.15), "blocks|embed", elementwise=True)


def trained(stage, size, warmup=False, donate=False, policy=None):
    """Hashes of masters and of averages, and a loss of each."""
    chain = fz.zero(zoo.source(), *RIGHT, CLAMPED, fz.ema(0.8, warmup), stage=stage, accumulate=zoo.FEW // size)
    masters, _, state, step = zoo.train(chain, {"data": size}, donate=donate, policy=policy)
    mean = fz.averaged(state)
    rows = step.local_rows(zoo.batch(9))
    losses = [step.eval(zoo.loss_plain)(s, rows).loss.item() for s in (state, mean)]
    return tree_hash(masters), tree_hash(step.params(mean)), losses[0] != losses[1]


@pytest.mark.parametrize("warmup", [False, True])
@EACH
def test_the_same_bits_at_every_stage(run_world, warmup, whole):
    want = trained(0, 1, warmup)
    assert want[2]
    for stage in range(4) if whole else (0, 3) if warmup else (1, 2):
        assert all(found == want for found in run_world(2, trained, stage, 2, warmup))
    assert trained(3, 1, warmup, donate=True) == want


def test_the_average_is_the_plain_one():
    """By hand, with a skipped update, and with masters in bfloat16."""
    for policy, exact in (("float64", True), ("bfloat16", False)):
        loss = lambda p, b: ((p["w"] * b.sum()).sum(), torch.tensor(float(len(b))))
        step = fz.train_step(fz.value_and_grad(loss), fz.sgd(1.0), fz.ema(0.75), policy=policy)
        state = step.init({"w": torch.tensor([1.0, -2.0]).to(step.policy.params)})
        want = step.params(state)["w"].double()
        for b in (1.0, float("nan"), 2.0):
            state, m = step(state, torch.full((2,), b).to(step.policy.compute))
            if m.ok:
                want = 0.75 * want + 0.25 * step.params(state)["w"].double()
        own = state.chain["ema"]
        assert int(own.count) == 2 and own.average.buffers[0].dtype == (torch.float64 if exact else torch.float32)
        torch.testing.assert_close(own.average.leaves()[0].double(), want, rtol=1e-6, atol=1e-6)
        assert step.params(fz.averaged(state))["w"].dtype == step.policy.params


def test_warmup_forgets_the_start():
    loss = lambda p, b: ((p["w"] * b.sum()).sum(), torch.tensor(float(len(b))))
    step = fz.train_step(fz.value_and_grad(loss), fz.sgd(1.0), fz.ema(0.999, warmup=True), policy="float64")
    state = step.init({"w": torch.zeros(1, dtype=torch.float64)})
    state, _ = step(state, torch.ones(2))
    assert step.params(fz.averaged(state))["w"].item() == pytest.approx(-1.0 * (1 - 0.1))


def test_frozen_leaves_are_themselves():
    step = fz.train_step(zoo.source(), fz.all_reduce("data"), fz.freeze("embed"), *RIGHT, fz.ema(0.5), mesh={"data": 1})
    state, _ = step(step.init(zoo.params()), zoo.batch(0))
    was, now = step.params(state), step.params(fz.averaged(state))
    assert torch.equal(was["embed"], now["embed"])


def test_a_checkpoint_and_another_stage_keep_it(tmp_path):
    steps = [
        fz.train_step(*fz.zero(zoo.source(), *RIGHT, fz.ema(0.5), stage=stage), mesh={"data": 1}) for stage in (3, 1)
    ]
    state, _ = steps[0](steps[0].init(zoo.params()), zoo.batch(0))
    with fz.Checkpointer(tmp_path, step=steps[0]) as checkpointer:
        checkpointer.save(state, 1)
        checkpointer.wait()
        again, *_ = checkpointer.restore(like=(steps[1], zoo.params()))
    for other in (again, fz.reshard(state, steps[1])):
        assert tree_hash(steps[1].params(fz.averaged(other))) == tree_hash(steps[0].params(fz.averaged(state)))


def test_it_stands_right_of_the_last_optimizer_and_inside_its_bracket():
    g = zoo.source()
    for right in (fz.ema(0.5), fz.project(torch.relu)):
        with pytest.raises(fz.ChainError, match="write it right of the last optimizer"):
            fz.train_step(g, fz.all_reduce("data"), right, *RIGHT, mesh={"data": 2})
        with pytest.raises(fz.ChainError, match="write it inside, beside the optimizer"):
            fz.train_step(g, fz.shard("data", *RIGHT), right, mesh={"data": 2})
    with pytest.raises(fz.ChainError, match="nothing says that it works value by value, but the leaves are cut over"):
        fz.train_step(g, fz.shard("data", *RIGHT, fz.project(torch.relu)), mesh={"data": 2})
    fz.train_step(g, fz.all_reduce("data"), *RIGHT, fz.project(lambda w: w / w.norm()), mesh={"data": 2})
    with pytest.raises(KeyError, match="no transform of this chain keeps an average"):
        step = fz.train_step(g, fz.all_reduce("data"), *RIGHT, mesh={"data": 1})
        fz.averaged(step.init(zoo.params()))
    for wrong in (1.0, -0.1, "0.9"):
        with pytest.raises((TypeError, ValueError), match="ema: decay="):
            fz.ema(wrong)


def test_a_projection_is_asked_for_a_tensor_like_the_given_one():
    g = fz.value_and_grad(zoo.loss_plain, batch=P("data"))
    step = fz.train_step(g, fz.all_reduce("data"), *RIGHT, fz.project(lambda w: w.sum(), "embed"), mesh={"data": 1})
    with pytest.raises(TypeError, match="project: of parameter 'embed' its function makes torch.float32 of shape"):
        step(step.init(zoo.params()), zoo.batch(0))


def test_a_projection_that_finds_no_parameter_is_refused():
    g = fz.value_and_grad(zoo.loss_plain, batch=P("data"))
    for which, right in (("no such", RIGHT), ("embed", (fz.freeze("embed"), *RIGHT))):
        step = fz.train_step(g, fz.all_reduce("data"), *right, fz.project(torch.relu, which), mesh={"data": 1})
        with pytest.raises(ValueError, match=rf"project\('{which}'\): the regex '{which}' matches no parameter"):
            step.init(zoo.params())


def test_hugging_face_loads_an_export_of_the_average(tmp_path):
    transformers = pytest.importorskip("transformers")
    from funczero.checkpoint.export import export

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()

    def loss(model, ids):
        logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()), torch.tensor(1.0)

    loss_fn, params = fz.stateless(model, loss)
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(loss_fn, batch=P("data")), fz.adamw(1e-1), fz.ema(0.5), stage=3), mesh={"data": 1}
    )
    state, ids = step.init(params), torch.arange(8)[None]
    for _ in range(2):
        state, _ = step(state, ids)
    mean = fz.averaged(state)
    with fz.Checkpointer(tmp_path / "ck", step=step) as checkpointer:
        checkpointer.save(mean, 1)
        checkpointer.wait()
    config.save_pretrained(tmp_path / "hf")
    export(tmp_path / "ck", tmp_path / "hf" / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    want = torch.func.functional_call(model, step.params(mean), (ids,)).logits
    assert torch.equal(again(ids).logits, want) and not torch.equal(want, model(ids).logits)
    assert step.eval(loss_fn)(mean, ids).loss.item() == pytest.approx(loss(again, ids)[0].item(), rel=1e-5)

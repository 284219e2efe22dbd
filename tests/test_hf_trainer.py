"""funczero.hf.Trainer beside the stock one: its numbers and files on one process; one hash wherever it runs."""

from __future__ import annotations

import importlib.util
import json
from functools import cache

import hf_trainers as h
import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="it is not installed")
FAST = (2, 2), (3, 2)
SLOW = [(s, w) for s in range(4) for w in (1, 2) if (s, w) not in FAST]
EVERYWHERE = [*FAST, *(pytest.param(*at, marks=pytest.mark.slow) for at in SLOW)]
TIME = 400.0  # the first import of transformers takes a minute where everybody imports


def zero(stage, **more):
    from funczero.hf import Zero

    return Zero(stage, **more)


@cache
def stock(kind="gpt2", way="", **more):
    """The stock Trainer's, in this process."""
    return h.fit(None, kind, **h.ways(way, None), **more)


@cache
def dropped(kind="gpt2"):
    """The hash of a training with dropout, in this process."""
    return h.fit(zero(0), kind, dropped=True)["hash"]


def furthest(got, want):
    """The largest relative distance."""
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a / b - 1) if b else abs(a) for a, b in pairs)


def same(got, want, loss=1e-6, weights=2e-6):
    assert furthest(got["updates"], want["updates"]) < loss
    assert furthest([[*got["evals"], got["eval"]]], [[*want["evals"], want["eval"]]]) < loss
    torch.testing.assert_close(got["predicted"], want["predicted"], rtol=1e-4, atol=1e-5)
    assert got["weights"].keys() == want["weights"].keys()
    for n, x in got["weights"].items():  # a key's bias has no gradient but rounding
        far = (x - want["weights"][n]).abs().max().item()
        assert far < (1e-4 if n.endswith(("c_attn.bias", "key.bias")) else weights), n


@pytest.mark.parametrize(("stage", "world"), EVERYWHERE)
def test_a_training_is_the_stock_trainers_on_one_process(run_world, stage, world):
    """Rows of many lengths, losses by words, two epochs that end in a short window; and dropout has one hash."""
    kinds = ["gpt2"] if (stage, world) == (2, 2) else ["bert"] if (stage, world) == (3, 2) else ["gpt2", "bert", "t5"]
    for kind in kinds:
        more = {"eval_strategy": "epoch"}
        for got in run_world(world, h.fits, zero(stage), kind, more, timeout=TIME):
            same(got["quiet"], stock(kind, **more))
            assert got["dropped"] == dropped(kind)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_hash_is_that_of_any_chain(run_world, world):
    """Nodes, exact sums, an average, units that are whole, a chain of one's own; and four ranks."""
    import funczero as fz

    own = zero(2, chain=fz.mics, mesh={"node": 2, "local": -1})
    for chain in (zero(3, hpz=2), zero(3, threshold=200), zero(1, ema=0.9), zero(2, units=()), own):
        assert {x["hash"] for x in run_world(world, h.fit, chain, "gpt2", None, True, timeout=TIME)} == {dropped()}
    exact = h.fit(zero(0, sums="exact"), dropped=True)["hash"]
    assert {x["hash"] for x in run_world(world, h.fit, zero(3, sums="exact"), "gpt2", None, True, timeout=TIME)} == {
        exact
    }


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((3, 2), (1, 1)), ((0, 1), (2, 2)), ((2, 2), (3, 1))])
def test_a_killed_training_goes_on_elsewhere_to_the_same_bits(tmp_path, before, after):
    from test_loops import start, told

    folder = tmp_path / "killed"
    told(start("hf", before[0], folder, before[1], "killed", shim=False), folder, killed=True)
    got = told(start("hf", after[0], folder, after[1], "resumed", shim=False), folder)
    assert len(got["killed"]) == 4 and [x[0] for x in got["resumed"][:4]] == got["killed"]
    assert got["hash"] == dropped()


WAYS = (
    "own loss", "loss function", "no items", "smoothed", "checkpointing", "workers", "adapters", "adafactor", "sgd",
    "adagrad", "rmsprop", "torch's",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(3, 2), (2, 2), (1, 1)])
def test_other_ways_are_those_of_the_stock_trainer(run_world, stage, world):
    for way in WAYS:
        for got in run_world(world, h.beside, way, zero(stage), timeout=TIME):
            same(got, h.beside(way))


@pytest.mark.slow
def test_batch_norm_is_the_stock_trainers_where_an_update_is_one_micro_batch():
    same(h.fit(zero(3), "resnet", micros=1), stock("resnet", micros=1), weights=1e-5)


def test_callbacks_and_files_are_the_stock_trainers(tmp_path, run_world):
    """Events in their order with their arguments; names and contents of a checkpoint; the best model at the end."""
    want = h.saved(None, str(tmp_path / "stock"))
    assert h.saved(zero(2), str(tmp_path / "alone"))["events"] == want["events"]
    got = run_world(2, h.saved, zero(3), str(tmp_path / "ours"), timeout=TIME)
    each = "on_substep_end", "on_prediction_step"  # of a rank's own micro-batches, of which there are half as many
    for one in got:
        assert [x for x in one["events"] if x[0] not in each] == [x for x in want["events"] if x[0] not in each]
        assert one["best"] == want["best"].replace("stock", "ours") and one["kept"] == want["kept"]
        assert furthest([one["evals"]], [want["evals"]]) < 1e-6 and furthest(one["updates"], want["updates"]) < 1e-6
    for step in want["kept"]:
        ours, theirs = ({p.name for p in (tmp_path / who / step).iterdir()} for who in ("ours", "stock"))
        assert ours - {"funczero", "rng_state_0.pth", "rng_state_1.pth"} == theirs - {"optimizer.pt", "rng_state.pth"}
        said = [json.loads((tmp_path / who / step / "trainer_state.json").read_text()) for who in ("ours", "stock")]
        assert [sorted(x) for x in said[0]["log_history"]] == [sorted(x) for x in said[1]["log_history"]]
        assert {k for k in said[0] if said[0][k] != said[1][k]} <= {
            "best_metric", "best_model_checkpoint", "log_history", "total_flos", "num_input_tokens_seen"
        }  # fmt: skip
        assert said[0]["num_input_tokens_seen"] == said[1]["num_input_tokens_seen"]
        assert said[0]["total_flos"] == said[1]["total_flos"]
    import transformers

    models = [
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / who / want["kept"][-1]) for who in ("ours", "stock")
    ]
    words = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(models[0](words).logits, models[1](words).logits, rtol=1e-5, atol=1e-5)
    assert models[0].lm_head.weight is models[0].transformer.wte.weight


ORDERS = {
    "stage 0": lambda k, w: (("accumulate", k), ("data", w)),
    "stage 3": lambda k, w: (("data", w), ("accumulate", k)),
    "nodes": lambda k, w: (("local", 2), ("accumulate", k), ("node", w // 2)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_every_micro_batch_is_dealt_once_and_all_ranks_run_as_many(order):
    """However many an epoch has, from whichever update on; and the copies in empty places are of the update's first."""
    from itertools import product

    from funczero.core.types import Layout
    from funczero.hf.rows import Deal, Micros, TrainRows

    class Rows(TrainRows):
        def __init__(self, number, world, deal):
            loader = torch.utils.data.DataLoader(range(2 * number), 2, collate_fn=list)
            super().__init__(Micros(loader, 0), world)
            self.deal = deal

    for k, world, number in product((1, 3), (2, 4), range(1, 14)):
        layout = Layout(order=ORDERS[order](k, world))
        axes = [(n, size) for n, size in layout.order if n != "accumulate"]
        ranks = product(*(range(size) for _, size in axes))
        deals = [Deal.of(layout, dict(zip([n for n, _ in axes], at, strict=True)).get) for at in ranks]
        size = k * world
        for first in range(-(-number // size)):
            found = [list(Rows(number, world, d).windows(0, first)) for d in deals]
            for u, windows in enumerate(zip(*found, strict=True), first):
                assert len({len(w.own) for w in windows}) == 1
                places = [p for w in windows for p, _ in w.own]
                real = sorted(p.number for p in places if p.real)
                assert real == list(range(u * size, min((u + 1) * size, number)))
                assert all(p.number == u * size for p in places if not p.real)
                assert all(rows == [2 * p.number, 2 * p.number + 1] for w in windows for p, rows in w.own)


def test_rows_of_an_evaluation_count_once_in_their_order():
    from funczero.hf.evaluation import EvalRows

    for number, world in ((1, 2), (7, 2), (9, 4), (12, 3)):
        loader = torch.utils.data.DataLoader(torch.arange(float(number)), 2)
        ranks = [EvalRows(loader, r, world, 0) for r in range(world)]
        seen = []
        for batches in zip(*ranks, strict=True):
            most = max(ranks[0].most, 2)
            padded = torch.cat([torch.cat([x, x.new_zeros(most - len(x))]) for x in batches])
            seen += ranks[0].gathered({"x": batches[0]}, lambda x: padded)["x"].tolist()  # noqa: B023
        assert seen == list(range(number))


def test_adafactor_is_hugging_faces():
    """Rows without a gradient, tiny gradients, vectors and matrices."""
    from transformers.optimization import Adafactor

    import funczero as fz

    torch.manual_seed(0)
    params = {"w": torch.randn(6, 5), "b": torch.randn(7)}
    plain = {n: torch.nn.Parameter(x.clone()) for n, x in params.items()}
    theirs = Adafactor(plain.values(), lr=0.1, weight_decay=0.1, scale_parameter=False, relative_step=False)
    tx = fz.adafactor(0.1, -0.8, (1e-15, 1e-3), 1.0, 0.1, relative=False)
    loss = lambda p, b: (sum((p[n] * b[n][0]).sum() for n in p), torch.ones(()))
    step = fz.train_step(fz.value_and_grad(loss), tx)
    state = step.init(params)
    for t in range(5):
        grads = {n: torch.randn(1, *x.shape) * 10.0 ** (-3 * t) for n, x in params.items()}
        grads["w"][0, 2] = 0
        state, _ = step(state, grads)
        for n, p in plain.items():
            p.grad = grads[n][0]
        theirs.step()
        for n, x in step.params(state).items():
            torch.testing.assert_close(x, plain[n].detach(), rtol=1e-5, atol=1e-6)


def test_examples():
    """Collecting them would import transformers where it is not installed."""
    import doctest

    from funczero.hf import optimizers, rows

    for module in (optimizers, rows):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


def test_a_model_on_meta_gets_its_values_from_a_checkpoint_alone(tmp_path):
    want, got, said = h.on_meta(str(tmp_path))
    assert got == want and "parameter 'transformer.wte.weight' has no values (it lies on meta" in said


def test_a_devices_cache_is_emptied_as_often_as_by_the_stock_trainer(monkeypatch):
    from funczero.hf import Zero

    counts = []
    for where, zero in (("transformers.trainer", None), ("funczero.hf.trainer", Zero())):
        calls = []
        monkeypatch.setattr(f"{where}.clear_device_cache", lambda kept=calls: kept.append(1))
        h.fit(zero, max_steps=3, torch_empty_cache_steps=2)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_what_cannot_be_right_is_refused_by_name(tmp_path):
    for name, (words, said) in h.refused(str(tmp_path)).items():
        assert words in said, (name, said)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_more_that_has_no_stock_beside_it(run_world, tmp_path, world):
    """bfloat16, float16 by a config, "auto", wires, an average, a stream of rows, a window that a callback breaks."""
    found = run_world(world, h.more, str(tmp_path), timeout=TIME)
    alone = h.more(str(tmp_path / "alone"))
    for got in found:
        assert got["hashes"] == alone["hashes"]
        assert got["config"] == pytest.approx(alone["config"], rel=1e-6)
    quiet = stock()["updates"]
    assert furthest([x[:1] for x in alone["bf16"]], [x[:1] for x in quiet]) < 0.05
    assert furthest([x[:1] for x in alone["wires"]], [x[:1] for x in quiet]) < 0.05
    assert alone["averaged"] and alone["broken"] == 4


def test_weights_of_an_update_that_failed_amid_its_writing_are_neither_shown_nor_saved(tmp_path, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    t = h.trainer(zero(2), "gpt2", tmp_path, max_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr("funczero.transforms.update.Updated", fails)
        with pytest.raises(torch.OutOfMemoryError):
            t.train()
    for look in (lambda: t.save_model(str(tmp_path / "kept")), lambda: t.whole().__enter__(), t.evaluate):
        with pytest.raises(RuntimeError, match="this state was donated at step 0 and its memory is in use"):
            look()
    with pytest.raises(RuntimeError, match="an error has ended its training, .* the model and a Trainer of it anew"):
        t.train()

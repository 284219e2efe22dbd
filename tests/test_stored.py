"""gradients/stored.py and fz.beside: a base at rest in int8 or bfloat16, with adapters that learn beside it."""

from __future__ import annotations

import pytest
import torch
from cover import EACH
from modules import batch as net_batch
from torch import nn

import funczero as fz
from funczero import P
from funczero.gradients.stored import StoredGathers, StoredTape
from funczero.testing import simulate, tree_hash

RANK, WIDE = 2, 512


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, WIDE), nn.Linear(WIDE, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Four blocks; rows of two scales and of a short one, an odd number of rows, a tied head, a scalar."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 12), nn.ModuleList(Block() for _ in range(4))
        self.odd, self.gain = nn.Linear(12, 5), nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for b in self.blocks:
            x = b(x)
        return self.head(x) * self.gain + self.odd(x).sum(-1, keepdim=True)


ADAPTERS = fz.lora(rank=RANK, match="up|down", alpha=3)


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ADAPTERS.module(Net())


def loss(model, b):
    logits = model(b["x"]).flatten(0, 1)
    return nn.functional.cross_entropy(logits, b["y"].flatten(), reduction="sum"), torch.tensor(float(b["y"].numel()))


def made(stage=3, own=3, storage="int8", world=1, **more):
    """(step, state, base, what is frozen, the module) with one global batch an update."""
    module = model()
    loss_fn, params, rest = fz.beside(*fz.stateless(module, loss), lambda: base)
    grad = fz.value_and_grad(loss_fn, batch=P("data"))
    chain = fz.zero(grad, fz.adamw(1e-1), stage=stage, accumulate=2 // world)
    step = fz.train_step(*chain, mesh={"data": world})
    base = fz.frozen(rest, step, stage=own, storage=storage, units=["blocks"], **more)
    return step, step.init(params), base, rest, module


def trained(stage, own, storage="int8", world=1, updates=2, **more):
    step, state, base, _, _ = made(stage, own, storage, world, **more)
    for t in range(updates):
        state, metrics = step(state, step.local_rows(net_batch(t)))
    return step.params(state), metrics.loss.item(), base.nbytes


def hashed(*args, **more):
    params, last, nbytes = trained(*args, **more)
    return tree_hash((params, torch.tensor(last))), nbytes


FORMS = [(0, 0, 1), (3, 3, 1), (0, 3, 2), (1, 3, 2), (2, 3, 2), (3, 3, 2), (3, 0, 2)]


@EACH
@pytest.mark.parametrize("storage", ["int8", "bfloat16"])
def test_one_hash_over_stages_of_both_and_worlds(storage, whole):
    some = FORMS if whole else FORMS[int(storage == "int8") :: 2]
    found = {
        bits for stage, own, world in some for bits, _ in simulate({"data": world})(hashed, stage, own, storage, world)
    }
    assert len(found) == 1


def read(x):
    """What int8 reads as, by hand: a scale for every 256 values of a row."""
    if x.dim() < 2:
        return x
    parts = [p.float() for p in x.split(256, 1)]
    tops = [p.abs().amax(1, keepdim=True) for p in parts]
    codes = [torch.round(p / top * 127) for p, top in zip(parts, tops, strict=True)]
    return torch.cat([c / 127 * top for c, top in zip(codes, tops, strict=True)], 1)


def gradient(storage="int8"):
    step, state, *_ = made(3, 3, storage)
    batch = step.local_rows(net_batch(0))
    state = step.set(state, {leaf.path: 0.1 for leaf in state.params.where.structure.leaves if "lora_B" in leaf.path})
    return step.grads(state, batch), step(state, batch)[1].loss.item()


def test_values_are_those_of_a_plain_model_over_the_rounded_base():
    """Loss and gradients by torch, over weights that were rounded by hand."""
    net = model()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.full_like(p, 0.1) if "lora_B" in name else p if p.requires_grad else read(p))
    total, weight = loss(net, net_batch(0))
    (total / weight).backward()
    ((found, first),) = simulate({"data": 1})(gradient)
    assert first == pytest.approx((total / weight).item(), rel=1e-6)
    learning = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
    assert found.keys() == learning.keys()
    for n, g in learning.items():
        torch.testing.assert_close(found[n], g, rtol=1e-4, atol=1e-6)


def test_bytes_at_rest_are_a_quarter_and_cut():
    """Codes, a scale for 256 values, vectors as they were; halved by two ranks up to the padding of slots."""
    matrices = [(11, 12), (5, 12)] + 4 * [(WIDE, 12), (12, WIDE)]
    vectors = 1 + 5 + 4 * (12 + 12 + WIDE + 12)
    least = sum(n * m + 4 * n * -(-m // 256) for n, m in matrices) + 4 * vectors
    (whole,) = (n for _, _, n in simulate({"data": 1})(trained, 3, 3, "int8", 1, 1))
    assert least <= whole <= least + 40 * 16 * 4
    halves = [n for _, _, n in simulate({"data": 2})(trained, 3, 3, "int8", 2, 1)]
    assert max(halves) <= whole / 2 + 40 * 16 * 4
    (plain,) = (n for _, _, n in simulate({"data": 1})(trained, 3, 3, None, 1, 1))
    assert whole < 0.45 * plain


@pytest.mark.parametrize("stage", [0, 3])
def test_units_are_widened_one_by_one_and_again_in_the_backward(monkeypatch, stage):
    """Also where the adapters' own units are cut: what the forward saved of a base goes with its unit."""
    taken, tapes, sent, made = [], [], StoredGathers.sent, StoredTape.__init__

    def noted(self, units):
        taken.extend(self.whole.structure.units[u].seam for u in units)
        return sent(self, units)

    def started(self, *args):
        made(self, *args)
        tapes.append(self)

    monkeypatch.setattr(StoredGathers, "sent", noted)
    monkeypatch.setattr(StoredTape, "__init__", started)
    simulate({"data": 2})(trained, stage, 3, "int8", 2, 1)
    assert len(tapes) == 2 and all(t.gathers.peak <= 2 for t in tapes)
    assert sum(taken) == 2 * (4 + 3)  # the last block stays open for the backward


def kept(folder, storage):
    """Adapters and base out and in again, at another stage and placement."""
    world = torch.distributed.get_world_size()
    step, state, base, rest, module = made(3, 3, storage, world)
    state, _ = step(state, step.local_rows(net_batch(0)))
    fz.save_frozen(f"{folder}/base.safetensors", base)
    params = step.params(state)
    if torch.distributed.get_rank() == 0:
        fz.save_adapters(f"{folder}/adapters", ADAPTERS, module, params)
    meta = {n: x.to("meta") for n, x in rest.items()}
    tied = {id(x): meta[n] for n, x in reversed(rest.items())}
    meta = {n: tied[id(x)] for n, x in rest.items()}
    for stage in (0, 3):
        again = fz.load_frozen(f"{folder}/base.safetensors", meta, step, stage, units=["blocks"])
        other = fz.frozen(rest, step, stage, storage=storage, units=["blocks"])
        for a, b in zip(again.stored.leaves(), other.stored.leaves(), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)
    torch.distributed.barrier()
    back = fz.load_adapters(f"{folder}/adapters", ADAPTERS, {n: torch.zeros_like(x) for n, x in params.items()})
    assert tree_hash(back) == tree_hash(params)
    assert all("lora_" in leaf.path for leaf in state.params.where.structure.leaves)
    found = step.eval(fz.beside(*fz.stateless(module, loss), lambda: again).loss_fn)
    return found(state, step.local_rows(net_batch(3))).loss.item()


@pytest.mark.parametrize("storage", ["int8", "bfloat16"])
def test_adapters_and_base_are_kept_apart_bit_for_bit(tmp_path, storage):
    first = simulate({"data": 2})(kept, str(tmp_path), storage)
    size = (tmp_path / "base.safetensors").stat().st_size
    assert size < (40_000 if storage == "int8" else 60_000) * 2
    assert len(set(first)) == 1


def test_a_base_is_cut_over_axes_of_its_own():
    def run():
        module = model()
        loss_fn, params, rest = fz.beside(*fz.stateless(module, loss), lambda: base)
        grad = fz.value_and_grad(loss_fn, batch=P(("node", "local")))
        step = fz.train_step(fz.shard("node", fz.shard("local", grad, fz.adamw(1e-1))), mesh={"node": 2, "local": 2})
        base = fz.frozen(rest, step, storage="int8", axes=("local",), units=["blocks"], keep="embed|odd")
        state, metrics = step(step.init(params), step.local_rows(net_batch(0)))
        return base.where.axes, sum(base.stored.coded), tree_hash(step.params(state))

    found = simulate({"node": 2, "local": 2})(run)
    assert {axes for axes, _, _ in found} == {("local",)} and {n for _, n, _ in found} == {8}
    assert len({bits for *_, bits in found}) == 1


# --- refusals ---------------------------------------------------------------------------------------------------------
REFUSED = {
    "storage": ({"storage": "int4"}, "storage='int4' does not exist; write one of int8, bfloat16"),
    "axis": ({"axes": ("rows",)}, r"'rows' is no axis of the mesh; it has \['data'\]"),
    "keep": ({"storage": "int8", "keep": "nothing"}, "keep='nothing'"),
    "bare": ({"keep": "embed"}, "storage=int8 alone has codes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    given, words = REFUSED[name]
    step, *_, rest, _ = made()
    with pytest.raises(ValueError, match=words):
        fz.frozen(rest, step, units=["blocks"], **given)


def test_refused_by_name(tmp_path):
    step, state, base, rest, module = made()
    with pytest.raises(ValueError, match="storage is of a tree, and a state is read where it lies"):
        fz.frozen(state, step, storage="int8")
    bad = {n: x.clone().fill_(torch.inf) if n == "odd.weight" else x for n, x in rest.items()}
    with pytest.raises(ValueError, match="'odd.weight' holds inf or nan in float32, which no code of int8 stands for"):
        fz.frozen(bad, step, storage="int8", units=["blocks"])
    with pytest.raises(ValueError, match="beside: nothing is frozen among the parameters"):
        fz.beside(*fz.stateless(Net(), loss), lambda: base)
    with pytest.raises(ValueError, match="rests in the compute dtype"):
        fz.save_frozen(tmp_path / "base.safetensors", fz.frozen(rest, step, units=["blocks"]))
    remat = fz.beside(*fz.stateless(module, loss, remat=True), lambda: base).loss_fn
    again = fz.train_step(fz.value_and_grad(remat), fz.sgd(0.1))
    with pytest.raises(TypeError, match="unit 'blocks.0': its parameters lie with the step and beside it"):
        again(again.init(step.params(state)), net_batch(0))
    file = fz.save_frozen(tmp_path / "base.safetensors", base)
    for tree, words in (
        ({n: x for n, x in rest.items() if n != "gain"}, "also holds 'gain', which the tree does not have"),
        ({**rest, "odd.weight": torch.zeros(6, 12)}, "'odd.weight:scales' is torch.float32 of shape"),
        ({**rest, "more": torch.zeros(2)}, "has no 'more'"),
    ):
        with pytest.raises(fz.CheckpointError, match=words):
            fz.load_frozen(file, tree, step, units=["blocks"])

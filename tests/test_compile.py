"""step/compile.py: a captured step is the eager one. "graph" has its bits at every stage, so what is recorded is right;
"inductor" has its own, the same on any world."""

from __future__ import annotations

import enum
import functools
import importlib
import logging
import os
import sys
from itertools import product
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

import funczero as fz
from funczero import P
from funczero.core.types import ChainError
from funczero.testing import tree_hash


class Layer(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(p)

    def forward(self, x):
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Tied embedding and head, like layers; with batch norm where that is asked for."""

    def __init__(self, p=0.0, norm=False):
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, 8), nn.ModuleList(Layer(p) for _ in range(3))
        self.norm, self.head = nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.flatten(0, 1)).view_as(x))


def loss(model, batch):
    out = model(batch["x"]).flatten(0, 1)
    return F.cross_entropy(out, batch["y"].flatten(), reduction="sum"), torch.tensor(float(batch["y"].numel()))


def net(kind):
    torch.manual_seed(0)
    return Net(0.2 if kind == "dropout" else 0.0, kind == "norm")


def batch(t, rows=8, width=4):
    ids = torch.randint(0, 11, (rows, width + 1), generator=torch.Generator().manual_seed(t))
    return {"x": ids[:, :-1].contiguous(), "y": ids[:, 1:].contiguous()}


def make(kind="plain", stage=0, world=1, k=4, units=None, **kw):
    loss_fn, params = fz.stateless(net(kind), loss, units=units, remat=kind == "remat")
    grad = fz.value_and_grad(loss_fn, batch=P("data"), rng=kind == "dropout")
    chain = fz.zero(grad, fz.clip_by_global_norm(1.0), fz.adamw(1e-2), stage=stage, axis="data", accumulate=k // world)
    return fz.train_step(*chain, mesh={"data": world}, check=0, **kw), params


def by_sgd(source):
    return fz.train_step(source, fz.all_reduce("data"), fz.sgd(0.1), mesh={"data": 1})


def run(step, state, updates, **how):
    losses = []
    for t in updates:
        state, metrics = step(state, step.local_rows(batch(t, **how)))
        losses.append(metrics.loss.item())
    return state, losses


def captured(step):
    """How many programs a step has, and what it said."""
    capture = step.grad.env.capture
    return sum(r.program is not None for r in capture.records.values()), list(capture.told)


# All kinds and both stages; what is run again is gathered again, which stage 3 alone has.
FEW = {(0, "plain"), (3, "dropout"), (0, "norm"), (3, "remat")}
KINDS = [
    pytest.param(*row, marks=() if row in FEW else pytest.mark.slow, id=f"{row[0]}-{row[1]}")
    for row in product((0, 3), ("plain", "dropout", "norm", "remat"))
]


@pytest.mark.parametrize(("stage", "kind"), KINDS)
def test_what_is_recorded_has_the_bits_of_the_eager_step(kind, stage):
    step, params = make(kind, stage)
    fast = fz.compile(step, mode="graph")
    a, first = run(step, step.init(params), range(3))
    b, second = run(fast, fast.init(params), range(3))
    assert first == second and tree_hash(a) == tree_hash(b) and captured(fast) == (1, [])
    assert "eager's bits" in str(fast) and "compiled" not in str(step)


def in_a_world(kind, stage, world, mode):
    step, params = make(kind, stage, world)
    fast = fz.compile(fz.donate(step), mode=mode)
    state, losses = run(fast, fast.init(params), range(3))
    assert captured(fast) == (1, [])
    return losses, tree_hash(fast.params(state))


@pytest.mark.parametrize("stage", [3, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 2))])
def test_a_recording_runs_in_worlds(run_world, stage):
    """Gathers and scatters stand where the eager step has them: the bits are those of one process."""
    step, params = make("dropout", stage)
    state, losses = run(step, step.init(params), range(3))
    want = losses, tree_hash(step.params(state))
    assert run_world(2, in_a_world, "dropout", stage, 2, "graph") == [want] * 2


@pytest.mark.slow
def test_compiled_code_has_one_hash_on_any_world_and_at_any_stage(run_world):
    one = in_a_world("dropout", 0, 1, "inductor")
    step, params = make("dropout")
    assert one[0] == pytest.approx(run(step, step.init(params), range(3))[1], rel=1e-5)
    for size, stage in ((1, 3), (2, 0), (2, 3), (4, 0), (4, 3)):
        found = run_world(size, in_a_world, "dropout", stage, size, "inductor", timeout=600)
        assert found == [one] * size, (size, stage)


@pytest.mark.slow
def test_compiled_code_is_near_eager(kind="norm"):
    step, params = make(kind, 1)
    fast = fz.compile(step)
    state = step.init(params)
    a, b = step.grads(state, batch(0)), fast.grads(state, batch(0))
    assert a.keys() == b.keys() and captured(fast) == (1, []) and "another trajectory" in str(fast)
    for path in a:
        torch.testing.assert_close(a[path], b[path], rtol=1e-4, atol=1e-6)


def test_a_run_goes_from_one_to_the_other(tmp_path):
    """States, checkpoints and donation are the eager step's."""
    step, params = make()
    fast = fz.compile(fz.donate(step), mode="graph")
    want, _ = run(step, step.init(params), range(4))
    state, _ = run(step, step.init(params), range(2))
    with fz.Checkpointer(tmp_path) as saved:
        saved.save(state, 2)
        saved.wait()
        state = saved.restore(like=(fast, params)).state
    state, _ = run(fast, state, [2])
    state, _ = run(step, state, [3])
    assert tree_hash(state) == tree_hash(want)


def test_another_form_of_a_batch_is_recorded_in_print(caplog):
    step, params = make(k=1)
    fast = fz.compile(step, mode="graph")
    for width in (4, 6, 4):
        (a, first), (b, second) = (run(s, s.init(params), [0], width=width) for s in (step, fast))
        assert first == second
    assert captured(fast)[0] == 2 and "another form" in captured(fast)[1][0]


def test_a_conjugate_view_is_another_form():
    """Its dtype, shape and strides are those of what it is a view of."""
    loss = lambda p, b: ((p["w"] * b.imag).sum(), torch.tensor(1.0))
    step = by_sgd(fz.value_and_grad(loss, batch=P("data")))
    fast, state, x = fz.compile(step, mode="graph"), step.init({"w": torch.ones(3)}), torch.full((3,), 1j)
    for given in (x, x.conj(), x):
        assert fast(state, given)[1].loss == step(state, given)[1].loss


class Held:
    """An object with attributes, a slot's worth of them, a set, and a property that reads one."""

    shared = 1.0

    def __init__(self):
        self.by, self.among, self.small, self.array = 1.0, {1.0}, torch.ones(()), numpy.ones(3)
        self.deep, self.kind = {"er": [Slotted()]}, frozenset({Kind.ONE})
        self.module, self.fixed = settings(), nn.Parameter(torch.ones(()), requires_grad=False)
        self.order = {1.0: 0, 2.0: 0}

    @property
    def all(self):
        return self.shared


BY = {"by": 1.0}


def settings():
    """A module of somebody's."""
    return sys.modules["test_compile_settings"]


@functools.wraps(F.cross_entropy)
def wrapped(held):
    return BY["by"]


class Answers:
    def __getattr__(self, name):
        return BY["by"]


class Meta(type):
    @property
    def by(cls):
        return BY["by"]


class OfMeta(metaclass=Meta):
    pass


ANSWERS = Answers()


def by_a_text(held):
    return getattr(held.module, "by")  # noqa: B009


def by_globals(held):
    return globals()["BY"]["by"]


def by_import(held):
    return importlib.import_module("test_compile_settings").by


def by_closure():
    module = settings()
    return lambda held: module.by


class Kind(enum.Enum):
    ONE = (SimpleNamespace(by=1.0),)


class Slotted:
    __slots__ = ("by", "late")

    def __init__(self):
        self.by = 1.0


def reading():
    """It has an attribute."""


def shadowed(held):
    return abs(1.0)


def imports(held):
    import test_compile_settings

    return test_compile_settings.by


AROUND = {
    "attribute": (lambda h: h.by, lambda h: setattr(h, "by", 2.0)),
    "set": (lambda h: len(h.among), lambda h: h.among.add(2.0)),
    "tensor as a number": (lambda h: float(h.small), lambda h: h.small.fill_(2.0)),
    "tensor's data": (lambda h: float(h.small), lambda h: h.small.data.fill_(2.0)),
    "array": (lambda h: float(h.array[0]), lambda h: h.array.fill(2.0)),
    "slot": (lambda h: h.deep["er"][0].by, lambda h: setattr(h.deep["er"][0], "by", 2.0)),
    "empty slot": (lambda h: getattr(h.deep["er"][0], "late", 1.0), lambda h: setattr(h.deep["er"][0], "late", 2.0)),
    "member": (lambda h: next(iter(h.kind)).value[0].by, lambda h: setattr(Kind.ONE.value[0], "by", 2.0)),
    "name": (shadowed, lambda h: globals().update(abs=lambda x: 2.0)),
    "class": (lambda h: h.all, lambda h: setattr(Held, "shared", 2.0)),
    "key": (lambda h: 1.0 + h.deep.get("new", 0.0), lambda h: h.deep.update(new=1.0)),
    "vars": (lambda h: getattr(h, "new", 1.0), lambda h: setattr(h, "new", 2.0)),
    "function": (lambda h: reading.by, lambda h: setattr(reading, "by", 2.0)),
    "module": (imports, lambda h: setattr(sys.modules["test_compile_settings"], "by", 2.0)),
    "environment": (
        lambda h: float(os.environ.get("FUNCZERO_BY", 1)),
        lambda h: os.environ.update(FUNCZERO_BY="2"),
    ),
    "os.getenv": (lambda h: float(os.getenv("FUNCZERO_BY", "1")), lambda h: os.environ.update(FUNCZERO_BY="2")),
    "module in an attribute": (lambda h: h.module.by, lambda h: setattr(h.module, "by", 2.0)),
    "module by getattr": (by_a_text, lambda h: setattr(h.module, "by", 2.0)),
    "module by import_module": (by_import, lambda h: setattr(h.module, "by", 2.0)),
    "module in a closure": (lambda h: by_closure()(h), lambda h: setattr(h.module, "by", 2.0)),
    "globals": (by_globals, lambda h: BY.update(by=2.0)),
    "wraps": (wrapped, lambda h: BY.update(by=2.0)),
    "__getattr__": (lambda h: ANSWERS.by, lambda h: BY.update(by=2.0)),
    "metaclass": (lambda h: OfMeta.by, lambda h: BY.update(by=2.0)),
    "parameter's data": (lambda h: float(h.fixed), lambda h: h.fixed.data.fill_(2.0)),
    "order": (lambda h: next(iter(h.order)), lambda h: h.order.update({1.0: h.order.pop(1.0)})),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_a_loss_reads_around_itself_is_compared(name, monkeypatch):
    reads, changes = AROUND[name]
    monkeypatch.setattr(Held, "shared", 1.0)
    monkeypatch.setattr(reading, "by", 1.0, raising=False)
    monkeypatch.setattr(Kind.ONE.value[0], "by", 1.0)
    monkeypatch.setitem(sys.modules, "test_compile_settings", ModuleType("test_compile_settings"))
    sys.modules["test_compile_settings"].by = 1.0
    monkeypatch.setitem(BY, "by", 1.0)
    monkeypatch.delenv("FUNCZERO_BY", raising=False)
    monkeypatch.setenv("FUNCZERO_BY_NOBODY", "1")  # which puts back what the change leaves
    held = Held()
    loss_fn = lambda p, b: (reads(held) * ((p["w"] - b) ** 2).sum(), torch.tensor(float(len(b))))
    step = by_sgd(fz.value_and_grad(loss_fn, batch=P("data")))
    fast = fz.compile(step, mode="graph")
    state = step.init({"w": torch.zeros(3)})
    first = fast(state, torch.ones(3))[1].loss.item()
    assert captured(fast) == (1, []) and fast(state, torch.ones(3))[1].loss.item() == first
    changes(held)
    assert fast(state, torch.ones(3))[1].loss.item() == 2 * first
    assert captured(fast)[0] == 1 and "which is another now: it is recorded again" in str(fast)
    os.environ.pop("FUNCZERO_BY", None)
    globals().pop("abs", None)


class OrderedConfig(dict):
    """Not copied with a module, as its own dicts are."""


def test_what_a_module_shares_with_the_world_is_compared():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model.settings, model.config, model.helper = SimpleNamespace(by=1.0), OrderedConfig(by=1.0), [nn.Identity()]
    model.helper[0].by = 1.0  # no module of the tree's, since it is in a list
    loss = lambda m, b: ((m(b) * m.settings.by * m.config["by"] * m.helper[0].by).sum(), torch.tensor(1.0))
    loss_fn, params = fz.stateless(model, loss)
    step = by_sgd(fz.value_and_grad(loss_fn, batch=P("data")))
    fast, state = fz.compile(step, mode="graph"), step.init(params)
    changes = (
        lambda: None,
        lambda: setattr(model.settings, "by", 2.0),
        lambda: model.config.update(by=2.0),
        lambda: setattr(model.helper[0], "by", 2.0),
    )
    for n, change in enumerate(changes):
        change()
        assert fast(state, torch.ones(2, 3))[1].loss == step(state, torch.ones(2, 3))[1].loss
        assert str(fast).count("recorded again") == n


COUNT = []


def counts(p, b):
    COUNT.append(0)
    return (p["w"] * b).sum(), torch.tensor(1.0)


def iterates(p, b, it=iter(range(10))):  # noqa: B008
    return (p["w"] * b).sum() * len(str(it)), torch.tensor(1.0)


KEPT = torch.arange(3.0)


def decides(p, b):
    return (p["w"].sum() * b.sum() if b.sum() > 0 else p["w"].sum()), torch.tensor(1.0)


def draws_from_python(p, b, key):
    import random

    return (p["w"] * b).sum() * random.random(), torch.tensor(1.0)


def by_its_key(p, b, key):
    return (fz.rng.dropout(p["w"], 0.5, key) * b).sum(), torch.tensor(1.0)


def draws_twice(p, b, key):
    hidden = checkpoint(lambda w: F.dropout(torch.tanh(w)), p["w"], use_reentrant=False)
    return (hidden * b).sum(), torch.tensor(1.0)


def draws_from_a_seed(p, b, key):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        noise = torch.rand(3)
    return (p["w"] * b * noise).sum(), torch.tensor(1.0)


def with_a_number(p, b, key):
    return (p["w"] * b).sum() * (key % 7), torch.tensor(1.0)


def writes(p, b):
    KEPT.add_(0.0)
    return (p["w"] * b * KEPT).sum(), torch.tensor(1.0)


@pytest.mark.parametrize(
    "loss_fn, why",
    [
        (decides, "Data"),
        (draws_from_python, "python's generator"),
        (by_its_key, "generator of its own"),
        (draws_twice, "draws in what runs again in the backward"),
        (draws_from_a_seed, "sets the state of torch's generator"),
        (with_a_number, "computes with its key"),
        (writes, "writes"),
        (counts, "it changes"),
        (iterates, "a range_iterator"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_recorded_runs_as_it_is_written(loss_fn, why, caplog):
    rng = "key" in loss_fn.__code__.co_varnames
    step = by_sgd(fz.value_and_grad(loss_fn, batch=P("data"), rng=rng))
    fast = fz.compile(step, mode="graph")
    state = step.init({"w": torch.ones(3)})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (want, metrics), (state, found) = step(state, torch.ones(3)), fast(state, torch.ones(3))
            assert found.loss == metrics.loss and tree_hash(state) == tree_hash(want)
    assert captured(fast)[0] == 0 and why in str(fast) and sum(why in r.getMessage() for r in caplog.records) == 1


def test_a_draw_without_a_key_is_refused_as_in_the_eager_step():
    loss_fn = lambda p, b: (F.dropout(p["w"] * b).sum(), torch.tensor(1.0))
    step = by_sgd(fz.value_and_grad(loss_fn, batch=P("data")))
    fast = fz.compile(step, mode="graph")
    for s in (step, fast):
        with pytest.raises(RuntimeError, match="draws from torch's global generator"):
            s(s.init({"w": torch.ones(3)}), torch.ones(3))


def test_refusals():
    plain = lambda p, b: (p["w"].sum(), torch.tensor(1.0))
    for source, why in (
        (fz.pullback(batch=P("data")), "its forward runs elsewhere"),
        (fz.value_and_grad(plain, batch=P("data"), higher_order=True), "higher_order"),
        (fz.value_and_grad(plain, batch=P("data"), units=("w",), conditional=("w",)), "conditional"),
    ):
        with pytest.raises(ChainError, match=why):
            fz.compile(by_sgd(source))
    with pytest.raises(ValueError, match="'fast' is none of"):
        fz.compile(make()[0], mode="fast")
    with pytest.raises(ChainError, match="the step that fz.compile was given"):
        fz.differentiable(fz.compile(by_sgd(fz.value_and_grad(plain, batch=P("data")))))


def test_a_model_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()

    def hugging(model, batch):
        logits = model(batch["x"]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), reduction="sum"), torch.tensor(32.0)

    loss_fn, params = fz.stateless(model, hugging)
    chain = fz.zero(fz.value_and_grad(loss_fn, batch=P("data"), rng=True), fz.adamw(1e-3), stage=3, axis="data")
    step = fz.train_step(*chain, mesh={"data": 1})
    fast = fz.compile(step, mode="graph")
    a, first = run(step, step.init(params), range(2))
    b, second = run(fast, fast.init(params), range(2))
    assert first == second and tree_hash(a) == tree_hash(b) and captured(fast) == (1, [])


RUNS = 4  # updates; the last one is skipped where a scale is told of what overflows


def both(parts, mesh, stream=0, **kw):
    """(hash of an eager run, hash of a captured one, what the capture said)."""
    step, hashes = fz.train_step(*parts, mesh=mesh, **kw), []
    for s in (step, fz.compile(step, mode="graph")):
        state, log = s.init(zoo.params(), key=7), []
        for t in range(RUNS):
            mine = s.local_rows(zoo.batch(t, micros=zoo.FEW))
            for b in [*zoo.split(mine, stream), None] if stream else [mine]:
                state, m = s(state, b)
            log.append(m)
        hashes.append(zoo.bits((s.params(state), log, state, s)))
    return (*hashes, captured(s))


def flat(size, all_of_them):
    """Stages and nestings of sums on one axis, and what stands left and right of the mean."""
    data, k = {"data": size}, zoo.FEW // size
    out = {}
    for name, (parts, stream) in zoo.flat_chains(zoo.source(), k, zoo.tx(scale=True)).items():
        if all_of_them or name == "1 stream":
            out[name] = both(parts, data, stream)
    three = lambda source, *right, **how: fz.zero(source, *(right or zoo.tx()), stage=3, accumulate=k, **how)
    frozen = lambda path: not path.startswith("blocks/1") and "embed" not in path
    out["exact"] = both(three(zoo.source()), data, sums="exact")
    out["half"] = both(three(zoo.source()), data, policy="params=float32,compute=bfloat16,accumulate=float32")
    out["frozen"] = both(three(zoo.source(trainable=frozen)), data)
    out["packed"] = both(three(zoo.source(), gather=fz.int8(64), scatter=fz.int8(64)), data)
    if not all_of_them:
        return out
    out["remat"] = both(three(zoo.source(loss_fn=zoo.loss_remat)), data)
    out["average"] = both(three(zoo.source(), fz.adamw(1e-2), fz.ema(0.9)), data)
    return out


def nested():
    """Chains of two axes."""
    sizes, source = {"node": 2, "local": 2}, zoo.source(("node", "local"))
    out = {n: both(parts, sizes, s) for n, (parts, s) in zoo.nested_chains(source, 1, zoo.tx()).items()}
    return out | {"ZeRO++": both(fz.zeropp(source, *zoo.tx()), sizes)}


@pytest.mark.parametrize("size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, "2 all"))])
def test_every_chain_has_the_bits_of_the_eager_one(run_world, size):
    size, whole = (2, True) if size == "2 all" else (size, size != 2)
    for rank in run_world(size, flat, size, whole, timeout=300):
        for name, (eager, recorded, said) in rank.items():
            assert eager == recorded and said == (1, []), (name, said)


@pytest.mark.slow
def test_every_nest_has_the_bits_of_the_eager_one(run_world):
    for rank in run_world(4, nested, timeout=300):
        for name, (eager, recorded, said) in rank.items():
            assert eager == recorded and said == (1, []), (name, said)

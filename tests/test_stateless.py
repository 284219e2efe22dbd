"""Modules as pure losses: the values of the plain module at every stage and world, and the module as it was."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import funczero as fz
from funczero import P
from funczero.gradients.ref import Ref
from funczero.gradients.stateless import stateless
from funczero.gradients.tape import Tape
from funczero.testing import tree_hash

VOCAB, DIM, TIME, ROWS, MICROS = 11, 6, 5, 2, 4


class Block(nn.Module):
    """A residual block with dropout and a direct parameter; calls counts its forwards."""

    def __init__(self, p=0.0, functional=False):
        super().__init__()
        self.norm, self.up, self.down, self.drop = (
            nn.LayerNorm(DIM),
            nn.Linear(DIM, 9),
            nn.Linear(9, DIM, bias=False),
            nn.Dropout(p),
        )
        self.gain, self.functional, self.calls = nn.Parameter(torch.tensor(0.5)), functional, []

    def forward(self, x, shift, *, scale=1.0):
        self.calls.append(1)
        h = self.down(torch.tanh(self.up(self.norm(x)))) * self.gain + shift * scale
        return x + (F.dropout(h, 0.3, self.training) if self.functional else self.drop(h))


class Net(nn.Module):
    """Tied embedding and head, a norm tied across blocks, one block used twice, one skipped, one under no_grad."""

    def __init__(self, p=0.0, functional=False, block=Block, wrap=None):
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(VOCAB, DIM), nn.Dropout(p), nn.Linear(DIM, VOCAB, bias=False)
        self.blocks = nn.ModuleList(block(p, functional) for _ in range(5))
        self.shift, self.wrap = nn.Parameter(torch.linspace(-1, 1, DIM)), wrap
        self.head.weight = self.embed.weight
        self.blocks[2].norm.weight = self.blocks[0].norm.weight

    def forward(self, x):
        h = self.drop(self.embed(x))
        for i, b in enumerate(self.blocks):
            if i == 3:
                continue
            h = checkpoint(b, h, self.shift, use_reentrant=False) if self.wrap else b(h, self.shift, scale=0.5)
        h = self.blocks[1](h, self.shift)
        with torch.no_grad():
            still = self.blocks[4](h, self.shift)
        return self.head(h + still)


def build(make, dtype=torch.float32, **kw):
    """The same module everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make(**kw).to(dtype)


def batch(t=0, dtype=torch.float32, rows=ROWS * MICROS):
    """Ragged weights, an empty row."""
    g = torch.Generator().manual_seed(50 + t)
    b = {n: torch.randint(VOCAB, (rows, TIME), generator=g) for n in "xy"}
    return b | {"mask": (torch.arange(TIME) < torch.randint(TIME + 1, (rows, 1), generator=g)).to(dtype)}


def loss(model, b):
    """Sum of masked losses, sum of weights."""
    nll = F.cross_entropy(model(b["x"]).flatten(0, 1), b["y"].flatten(), reduction="none").view(b["y"].shape)
    return (nll * b["mask"]).sum(), b["mask"].sum()


def hf_loss(model, b):
    """Every row weighs one."""
    out = model(**{k: v for k, v in b.items() if k != "labels"}).logits
    return F.cross_entropy(out.flatten(0, 1), b["labels"].flatten(), reduction="none").sum(), torch.tensor(
        float(b["labels"].numel())
    )


def want(module, loss, b):
    """Loss and gradients of the plain module by name, of the mean."""
    total, weight = loss(module, b)
    named = dict(module.named_parameters())
    live = {n: p for n, p in named.items() if p.requires_grad}
    grads = torch.autograd.grad(total / weight, list(live.values()), allow_unused=True)
    return (total / weight).item(), {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(live.items(), grads, strict=True)
    }


def got(loss_fn, params, b, stage, **kw):
    """The same from one step of gradient descent: (loss, gradients)."""
    dtype = str(next(iter(params.values())).dtype).removeprefix("torch.")
    policy = f"params={dtype},compute={dtype},accumulate={dtype}"
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(loss_fn, batch=P("data"), **kw), fz.sgd(1.0), stage=stage),
        mesh={"data": -1},
        policy=policy,
    )
    state = step.init(params)
    new, m = step(state, step.local_rows(b))
    old, new = step.params(state), step.params(new)
    return m.loss.item(), {n: old[n] - new[n] for n in old}


def far(module, loss, b, result):
    """Largest difference from the plain module."""
    (want_loss, want_grads), (loss_, grads) = want(module, loss, b), result
    return max([abs(want_loss - loss_)] + [(g - grads[n]).abs().max().item() for n, g in want_grads.items()])


# --- values -----------------------------------------------------------------------------------------------------------
def _gradients(stages):
    out = {}
    for remat in (False, True):
        net = build(Net, torch.float64)
        loss_fn, params = stateless(net, loss, remat=remat)
        for stage in stages:
            out[remat, stage] = far(
                net, loss, batch(dtype=torch.float64), got(loss_fn, params, batch(dtype=torch.float64), stage)
            )
    return out


@pytest.mark.parametrize(("world", "stages"), [(1, (0, 3)), (2, (0, 1, 2, 3)), (4, (3,))])
def test_gradients_are_the_modules_own(run_world, world, stages):
    for result in run_world(world, _gradients, stages):
        assert max(result.values()) < 1e-12, result


def _hashes(world, p, functional, stages):
    out = {}
    for remat in (False, True):
        for stage in stages:
            net = build(Net, p=p, functional=functional)
            loss_fn, params = stateless(net, loss, remat=remat)
            grad = fz.value_and_grad(loss_fn, batch=P("data"), rng=p > 0)
            step = fz.train_step(
                *fz.zero(grad, fz.clip_by_global_norm(0.5), fz.adamw(1e-2), stage=stage, accumulate=MICROS // world),
                mesh={"data": -1},
            )
            state, before = step.init(params, key=5), torch.get_rng_state()
            for t in range(3):
                state, m = step(state, step.local_rows(batch(t)))
            assert torch.equal(before, torch.get_rng_state())
            out[world, remat, stage] = tree_hash((step.params(state), m.loss, m.grad_norm))
    return out


@pytest.mark.parametrize(
    ("p", "functional"), [(0.0, False), (0.3, False), (0.3, True)], ids=["plain", "dropout", "functional dropout"]
)
def test_the_same_bits_at_every_stage_and_world_in_both_forms(run_world, p, functional):
    found = {}
    for world, stages in {1: (0, 3), 2: (0, 1, 2, 3), 4: (3,)}.items():
        for result in run_world(world, _hashes, world, p, functional, stages):
            assert all(found.setdefault(k, v) == v for k, v in result.items())
    assert len(set(found.values())) == 1, found


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
        "lstm": (lstm, sums, x, {}), "parametrized": (nn.Sequential(norm, nn.ReLU()), sums, x, {}), "encoder": (stack, sums, x, {}),
        "encoder remat": (stack, sums, x, {"remat": True}), "named units": (Walk(), sums, x, {"units": "steps"}),
        "named units remat": (Walk(), sums, x, {"units": "steps", "remat": True}),
    }  # fmt: skip


class Walk(nn.Module):
    """A dict of recurrent layers that give tuples; the state of one goes to the next, and a dict is filled on the way."""

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


def _frozen():
    out = {}
    for remat in (False, True):
        net = build(Net, torch.float64)
        net.blocks[0].requires_grad_(False)  # its norm is tied to block 2's
        net.blocks[1].up.requires_grad_(False)
        net.embed.requires_grad_(False)
        loss_fn, params = stateless(net, loss, remat=remat)
        for stage in (0, 2, 3):
            b = batch(dtype=torch.float64)
            result = got(loss_fn, params, b, stage, trainable=loss_fn.trainable)
            still = all(
                not result[1][n].any() for n, p in net.named_parameters(remove_duplicate=False) if not p.requires_grad
            )
            out[remat, stage] = still, far(net, loss, b, result)
    return out


def test_frozen_parameters_stay(run_world):
    for result in run_world(2, _frozen):
        assert all(still and d < 1e-12 for still, d in result.values()), result


def _wrapped():
    """A loop that checkpoints its blocks by itself, with dropout: the same bits as without."""
    out = {}
    for wrap in (None, True):
        for stage in (0, 3):
            net = build(Net, torch.float64, p=0.3, wrap=wrap)
            for b in net.blocks:
                b.forward.__func__.__kwdefaults__["scale"] = 0.5
            loss_fn, params = stateless(net, loss)
            out[wrap, stage] = tree_hash(got(loss_fn, params, batch(dtype=torch.float64), stage, rng=True)[1])
    Block.forward.__kwdefaults__["scale"] = 1.0
    return out


def test_blocks_inside_torchs_checkpoint(run_world):
    for result in run_world(2, _wrapped):
        assert len(set(result.values())) == 1, result


def _evaluate():
    out = []
    for stage in (0, 2, 3):
        net = build(Net, torch.float64, p=0.3)
        train_loss, params = stateless(net, loss)
        eval_loss, _ = stateless(net.eval(), loss)
        grad = fz.value_and_grad(train_loss, batch=P("data"), rng=True)
        step = fz.train_step(*fz.zero(grad, fz.sgd(0.0), stage=stage), mesh={"data": -1}, policy="float64")
        state = step.init(params)
        b = batch(dtype=torch.float64)
        state, _ = step(state, step.local_rows(b))
        total, weight = loss(net, b)
        out.append((step.eval(eval_loss)(state, step.local_rows(b)).loss - total / weight).abs().item())
        whole = eval_loss(step.params(state), b)
        out.append((whole[0] - total).abs().item())
    return out


def test_evaluation_and_whole_parameters(run_world):
    for result in run_world(2, _evaluate):
        assert max(result) < 1e-12


# --- memory -----------------------------------------------------------------------------------------------------------
def _peaks():
    out, take = {}, Tape.take
    live, most, tapes = weakref.WeakSet(), [], []

    def watched(self, unit):
        buffer = take(self, unit)
        if self.whole.structure.units[unit].seam:
            live.add(buffer.untyped_storage())
            most.append(len(live))
        return buffer

    for remat in (False, True):
        loss_fn, params = stateless(build(Plain), loss, remat=remat)

        def spied(params, batch, loss_fn=loss_fn):
            tapes.append(next(r.tape for r in params.values() if isinstance(r, Ref)))
            return loss_fn(params, batch)

        spied.units = loss_fn.units
        step = fz.train_step(
            *fz.zero(fz.value_and_grad(spied, batch=P("data")), fz.sgd(1.0), stage=3), mesh={"data": -1}
        )
        state = step.init(params)
        most.clear()
        gc.disable()
        Tape.take = watched
        state, _ = step(state, step.local_rows(batch()))
        Tape.take = take
        tape = tapes.pop()
        booked, tape = tape.peak, weakref.ref(tape)
        gone = tape() is None and not len(live)
        gc.enable()
        out[remat] = booked, max(most), gone
    return out


class Plain(nn.Module):
    """Six blocks, each used once."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Embedding(VOCAB, DIM),
            nn.ModuleList(Block() for _ in range(6)),
            nn.Linear(DIM, VOCAB),
        )

    def forward(self, x):
        h = self.embed(x)
        for b in self.blocks:
            h = b(h, h.new_ones(()))
        return self.head(h)


def test_two_units_at_a_time_and_nothing_is_left(run_world):
    for result in run_world(2, _peaks):
        for booked, real, gone in result.values():
            assert booked <= 2 and real <= 2 and gone, result


# --- the module is not touched ----------------------------------------------------------------------------------------
def _look(module):
    """Everything that could have been touched."""
    attributes = [
        {k: (id(v), len(v) if isinstance(v, (dict, list)) else None) for k, v in m.__dict__.items()}
        for m in module.modules()
    ]
    tensors = [
        (id(p), p.data_ptr(), p._version, p.grad is None, p.requires_grad)
        for p in [*module.parameters(), *module.buffers()]
    ]
    return (
        attributes,
        tensors,
        tree_hash(dict(module.state_dict())),
        [m.__dict__.get("forward") for m in module.modules()],
    )


@pytest.mark.parametrize("remat", [False, True])
def test_the_module_is_untouched(remat):
    net = build(Net, p=0.2)
    net.register_buffer("ones", torch.ones(3))
    before = _look(net)
    loss_fn, params = stateless(net, loss, remat=remat)
    live = {n: p.clone().requires_grad_() for n, p in params.items()}
    loss_fn(live, batch(), 3)[0].backward()
    assert _look(net) == before and all(p.grad is None for p in net.parameters())
    assert (
        params["embed.weight"] is params["head.weight"]
        and params["blocks.0.norm.weight"] is params["blocks.2.norm.weight"]
    )
    assert params["shift"].data_ptr() == net.shift.data_ptr() and not params["shift"].requires_grad


def test_it_is_a_snapshot():
    net = build(Net, p=0.5)
    loss_fn, params = stateless(net.eval(), loss)
    first = loss_fn(params, batch())[0]
    net.train()
    net.drop = nn.Identity()
    assert torch.equal(loss_fn(params, batch())[0], first) and not any(b.calls for b in net.blocks)


def test_the_users_parameters_can_be_freed():
    net = build(Net)
    alive = [weakref.ref(p) for p in net.parameters()]
    loss_fn, params = stateless(net, loss)
    del net, params
    assert not any(ref() is not None for ref in alive)


# --- randomness -------------------------------------------------------------------------------------------------------
def test_a_key_decides_and_the_global_generator_stays():
    loss_fn, params = stateless(build(Net, p=0.3), loss)
    values, before = [], torch.get_rng_state()
    for key in (1, 1, 2):
        values.append(loss_fn(params, batch(), key)[0].item())
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(key)
        before = torch.get_rng_state()
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("functional", "who"), [(False, "'drop' (Dropout, p=0.3)"), (True, "the forward of 'blocks.0'")]
)
def test_drawing_without_a_key_is_refused(functional, who):
    net = build(Net, p=0.3, functional=functional)
    net.drop.p = 0.0 if functional else 0.3
    for b in net.blocks:
        b.drop.p = 0.0
    loss_fn, params = stateless(net, loss)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="write value_and_grad\\(loss_fn, ..., rng=True\\)") as error:
        loss_fn(params, batch())
    assert who in str(error.value) and torch.equal(before, torch.get_rng_state())


def test_the_layer_that_draws_is_named():
    net = build(Net, p=0.3)
    net.drop.p = 0.0
    with pytest.raises(RuntimeError, match="'blocks.0.drop' \\(Dropout, p=0.3\\) draws from torch's global generator"):
        loss_fn, params = stateless(net, loss)
        loss_fn(params, batch())


# --- which lists ------------------------------------------------------------------------------------------------------
def test_units_are_found():
    def stage(n):
        return nn.Sequential(*(Block() for _ in range(n)))

    class Stage(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.layers = stage(n)

    deep = nn.ModuleDict(
        {"stages": nn.ModuleList([Stage(2), Stage(6)]), "heads": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}
    )
    assert stateless(Net(), loss)[0].units == ("blocks",)
    assert stateless(deep, loss)[0].units == ("stages.0.layers", "stages.1.layers")
    assert stateless(deep, loss, units=["heads"])[0].units == ("heads",)
    assert stateless(Net(), loss, units=())[0].units == () == stateless(nn.Linear(2, 2), loss)[0].units


class Asking(Block):
    """A block that asks for checkpointing."""

    gradient_checkpointing = True


def test_a_block_may_ask_to_run_again():
    net = build(Net, block=Asking)
    loss_fn, params = stateless(net, loss)
    calls, forward = [], Asking.forward
    Asking.forward = lambda self, *args, **kwargs: (calls.append(1), forward(self, *args, **kwargs))[1]
    try:
        total = loss_fn({n: p.clone().requires_grad_() for n, p in params.items()}, batch())[0]
        once = len(calls)
        total.backward()
    finally:
        del Asking.forward
    assert once == 6 and len(calls) == once + 5  # the one under no_grad is not run again
    assert all(b.gradient_checkpointing for b in net.blocks)


# --- refusals ---------------------------------------------------------------------------------------------------------
def _call(module, **kw):
    loss_fn, params = stateless(module, lambda model, b: (model(b).sum(), torch.tensor(1.0)), **kw)
    live = {n: p.clone().requires_grad_() for n, p in params.items()}
    loss_fn(live, torch.randn(4, DIM))[0].backward()


class Norm(nn.Module):
    def __init__(self, **kw):
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM, **kw)

    def forward(self, x):
        return self.norm(x)


class Cached(nn.Module):
    """Works out a non-persistent buffer anew, or keeps a count."""

    def __init__(self, lasting):
        super().__init__()
        self.lin = nn.Linear(DIM, DIM)
        self.register_buffer("table", torch.ones(DIM), persistent=lasting)

    def forward(self, x):
        self.table = self.table + 1
        return self.lin(x) * self.table


class Stray(nn.Module):
    """Blocks that read past their parameters, change their input or take odd things."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(Strange(kind) for _ in range(2))
        self.outer = nn.Linear(DIM, DIM)
        self.kind, outer = kind, [self.outer]
        self.hidden = (lambda x: outer[0](x)) if kind == "closure" else None

    def forward(self, x):
        if self.kind == "closure":
            return self.hidden(x)
        for b in self.blocks:
            x = b(
                x,
                {"outside": self.outer.weight, "in place": None, "object": Odd()}.get(self.kind),
                self.outer if self.kind == "outside" else None,
            )
        return self.blocks[0].lin.weight.sum() + x if self.kind == "peek" else x


class Odd:
    """Something mutable."""

    def __init__(self):
        self.values = []


class Strange(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lin, self.kind = nn.Linear(DIM, DIM), kind

    def forward(self, x, other, module):
        x = self.lin(x) if self.kind != "in place" else self.lin(x.mul_(2.0))
        return x if module is None else module(x)


@pytest.mark.parametrize(
    ("make", "kw", "error", "says"),
    [
        (
            lambda: Norm(),
            {},
            RuntimeError,
            (
                "changes buffer 'norm.num_batches_tracked', but a pure loss has nowhere to keep it; write"
                " fz.stateless\\(module.eval"
            ),
        ),
        (lambda: Cached(True), {}, RuntimeError, "changes buffer 'table'"),
        (lambda: nn.Linear(2, 2, device="meta"), {}, ValueError, "'weight' is on the meta device and has no values"),
        (
            lambda: Net(),
            {"units": "layers"},
            ValueError,
            "units='layers' names no list of blocks in Net; its repeated lists are \\['blocks'\\]",
        ),
        (lambda: Net(), {"units": "embed"}, ValueError, "units='embed' names no list of blocks"),
        (
            lambda: Stray("closure"),
            {},
            TypeError,
            "the forward reads parameter 'outer.weight' of the module that stateless was given, and not of its copy",
        ),
        (
            lambda: Stray("outside"),
            {"remat": True},
            TypeError,
            "unit 'blocks.0', which runs again in the backward \\(remat\\), reads a tensor of shape",
        ),
        (
            lambda: Stray("in place"),
            {"remat": True},
            RuntimeError,
            "unit 'blocks.0' runs again .* changes an input in place",
        ),
        (lambda: Stray("object"), {"remat": True}, TypeError, "unit 'blocks.0' runs again .* it is handed a Odd"),
        (
            lambda: Net().requires_grad_(False),
            {},
            TypeError,
            "is frozen in the module .* write value_and_grad\\(loss_fn, trainable=loss_fn.trainable",
        ),
    ],
)
def test_what_cannot_be_pure_is_refused(make, kw, error, says):
    with pytest.raises(error, match=says):
        _call(make(), **kw)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Norm().eval(),
        lambda: Norm(track_running_stats=False),
        lambda: Cached(False),
        lambda: Stray("outside"),
        lambda: Stray("object"),
    ],
)
def test_what_is_pure_is_not(make):
    _call(make())


def test_parameters_by_their_names():
    loss_fn, params = stateless(Net(), loss)
    with pytest.raises(ValueError, match="the parameters differ in 'shift'; give a flat dict"):
        loss_fn({n: p for n, p in params.items() if n != "shift"}, batch())
    with pytest.raises(ValueError, match="the parameters are a list"):
        loss_fn(list(params.values()), batch())


def _peek():
    loss_fn, params = stateless(Stray("peek"), lambda model, b: (model(b).sum(), torch.tensor(float(len(b)))))
    with pytest.raises(
        TypeError,
        match=(
            "parameter 'blocks.0.lin.weight' is inside a unit that is not open; a module may read it only inside that"
            " block's forward"
        ),
    ):
        got(loss_fn, params, torch.randn(4, DIM), 3)


def test_reading_a_closed_unit_is_refused(run_world):
    run_world(2, _peek)


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
    before = _look(module)
    loss_fn, params = stateless(module, hf_loss)
    result = got(loss_fn, params, b, 3)
    assert len(loss_fn.units) == lists and _look(module) == before
    return far(module, hf_loss, b, result)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_hugging_face_models(run_world, name):
    pytest.importorskip("transformers")
    for ask in (False, True):
        for difference in run_world(2, _hugging, name, ask):
            assert difference < 1e-12

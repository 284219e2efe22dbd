"""The engine is the chain: bit for bit at every stage; and its moments, windows and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.func import functional_call

import funczero as fz
import funczero.deepspeed as deepspeed
from funczero import tree
from funczero.layout.mesh import world_size
from funczero.testing import tree_hash

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}}
WARM = {
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2, "warmup_min_lr": 1e-3}}
}
PRECISIONS = {
    "fp32": {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}},
    "bf16": {"bf16": {"enabled": True}},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.b(torch.tanh(self.a(x))))


class Net(nn.Module):
    def __init__(self, blocks=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(()))
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for b in self.blocks:
            x = b(x)
        return self.last(x) * self.scale


def config(stage=0, k=1, precision="fp32", micro=4, **more):
    zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10}}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": k,
        **zero,
        **PRECISIONS[precision],
        **({} if "optimizer" in more else ADAM),
        **more,
    }


def rows(n, updates, k, dtype, bad=()):
    """Micro-batches of every update for this rank: of one global batch, dealt by hand."""
    g = torch.Generator().manual_seed(5)
    out = []
    for u in range(updates):
        x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)
        if u in bad:
            x[0, 0] = torch.inf
        out.append({"x": x.to(dtype), "y": y})
    return out


def through_the_engine(stage, k, precision, updates=6, bad=(), edit=None):
    engine, optimizer, _, scheduler = deepspeed.initialize(model=Net(), config=config(stage, k, precision, **WARM))
    seen = []
    for u, batch in enumerate(rows(4 * k * world_size(), updates, k, DTYPES[precision], bad)):
        if u == edit:
            optimizer.param_groups[0]["lr"] = 0.05
        for micro in zoo.split(engine.train_step.local_rows(batch), k):
            loss = F.cross_entropy(engine(micro["x"]).float(), micro["y"])
            engine.backward(loss)
            engine.step()
        seen.append((engine.metrics, optimizer.param_groups[0]["lr"], scheduler.get_lr(), optimizer.cur_scale))
    return engine, seen


def through_the_chain(stage, k, precision, updates=6, bad=(), edit=None):
    net, c = Net(), config(stage, k, precision, **WARM)
    frozen = "last.bias"
    make = None
    if edit is not None:

        def make(lr):
            return fz.adamw(
                lambda u: torch.where(u == edit, torch.tensor(0.05, dtype=torch.float64), lr(u)), weight_decay=0.1
            )

    chain, resolved = fz.from_deepspeed(c, pullback=True, optimizer=make, trainable=lambda path: path != frozen)
    step = fz.train_step(*chain, **resolved.arguments)
    state = step.init({n: p.detach() for n, p in net.named_parameters()})
    metrics = []
    for batch in rows(4 * k * world_size(), updates, k, DTYPES[precision], bad):
        for micro in zoo.split(step.local_rows(batch), k):
            views = step.view(state)
            loss = F.cross_entropy(functional_call(net, views, micro["x"]).float(), micro["y"])
            state, _ = step(state, (fz.pull(loss, views), loss, 1.0))
        state, m = step(state, None)
        metrics.append(m)
    return step, state, metrics


def same(stage, k, precision, bad=(), edit=None):
    engine, seen = through_the_engine(stage, k, precision, bad=bad, edit=edit)
    step, state, metrics = through_the_chain(stage, k, precision, bad=bad, edit=edit)
    mine, theirs = engine.train_step.params(engine.state), step.params(state)
    assert tree_hash(mine) == tree_hash(theirs)
    assert tree_hash([m[:8] for m, *_ in seen]) == tree_hash([m[:8] for m in metrics])
    assert (
        engine.skipped_steps == len(bad)
        and int(engine.state.updates) == int(state.updates)
        and engine.global_steps == int(state.step)
    )
    if precision == "fp16":
        assert tree_hash(engine.state.chain["scale_loss"]) == tree_hash(state.chain["scale_loss"])
    mu = engine.state.chain["adamw"]
    assert (
        tree_hash((mu.count, mu.mu.buffers)) == tree_hash((state.chain["adamw"].count, state.chain["adamw"].mu.buffers))
        or stage == 3
    )
    current = {n: x for n, x in engine.module.state_dict().items()}
    assert all(torch.equal(current[n], x.to(DTYPES[precision])) for n, x in mine.items())
    return tree_hash(mine)


def law(k, precision, bad, edit):
    return [same(stage, k, precision, bad, edit) for stage in range(4)]


CASES = [(1, "fp32", (), None), (3, "fp32", (1,), None), (2, "fp16", (1, 3), None), (2, "bf16", (), 2)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("k,precision,bad,edit", CASES)
def test_the_engine_and_the_step_of_its_config_give_the_same_bits(run_world, world, k, precision, bad, edit):
    hashes = zoo.everywhere(run_world, world, law, k, precision, bad, edit)
    assert len(set(hashes)) == 1 or (
        k == 3 and world == 2
    )  # ranks before time, or time before ranks: the same tree for powers of two


def leaving(stage, k=2):
    """The engine's run, and the same from its fourth micro-batch on with its step and state alone."""
    engine, *_ = deepspeed.initialize(model=Net(), config=config(stage, k, "bf16", **WARM))
    micros = [
        m
        for b in rows(4 * k * world_size(), 4, k, torch.bfloat16)
        for m in zoo.split(engine.train_step.local_rows(b), k)
    ]
    net, step, state = Net().bfloat16(), engine.train_step, None
    for j, m in enumerate(micros):
        if j == 5:
            state = tree.clone(engine.state)  # the engine goes on in place
        engine.backward(F.cross_entropy(engine(m["x"]).float(), m["y"]))
        engine.step()
    for j, m in enumerate(micros[5:], 5):
        views = step.view(state)
        loss = F.cross_entropy(functional_call(net, views, m["x"]).float(), m["y"])
        state, _ = step(state, (fz.pull(loss, views), loss, 1.0))
        if j % k == k - 1:
            state, _ = step(state, None)
    return (
        tree_hash(step.params(engine.state)),
        tree_hash(step.params(state)),
        engine.get_lr() == state.chain["param_groups"]["lr"].tolist(),
    )


@pytest.mark.parametrize("stage", range(4))
def test_leaving_the_engine_in_mid_window_is_one_line(run_world, stage):
    mine, theirs, schedule = zoo.everywhere(run_world, 2, leaving, stage)
    assert mine == theirs and schedule


# --- windows ----------------------------------------------------------------------------------------------------------
def make(stage=0, k=1, model=None, **more):
    more = {"gradient_clipping": 0, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}, **more}
    return deepspeed.initialize(model=Net() if model is None else model, config=config(stage, k, **more))[0]


def data(n=4, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


def gradient(*weighted):
    """Plain torch's gradient of a weighted sum of losses, by name."""
    net = Net()
    sum(w * F.cross_entropy(net(x), y) for w, (x, y) in weighted).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}


def moved(engine):
    """What the update took away, with lr 1: the gradient."""
    start = dict(Net().named_parameters())
    return {n: start[n].detach() - x for n, x in engine.module.state_dict().items()}


def close(a, b):
    for n in b:
        torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-6)


a, b, c = data(seed=1), data(seed=2), data(seed=3)


@pytest.mark.parametrize("stage", range(4))
def test_two_backwards_before_one_step_add_up(stage):
    engine = make(stage)
    for x, y in (a, b):
        engine.backward(F.cross_entropy(engine(x), y))
    engine.step()
    close(moved(engine), gradient((1, a), (1, b)))


@pytest.mark.parametrize("stage", range(4))
def test_two_forwards_before_two_backwards_and_a_retained_graph(stage):
    engine = make(stage)
    one, two = F.cross_entropy(engine(a[0]), a[1]), F.cross_entropy(engine(b[0]), b[1])
    with torch.no_grad():
        engine(c[0])
    engine.backward(one, retain_graph=True)
    engine.backward(two)
    engine.backward(one)
    engine.step()
    close(moved(engine), gradient((2, a), (1, b)))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_short_last_group_is_divided_as_a_full_one(stage):
    engine = make(stage, k=4)
    for i, (x, y) in enumerate((a, b, c)):
        engine.set_gradient_accumulation_boundary(i == 2)
        assert engine.backward(F.cross_entropy(engine(x), y)).item() == pytest.approx(
            F.cross_entropy(Net()(x), y).item() / 4
        )
        engine.step()
    close(moved(engine), gradient((1 / 4, a), (1 / 4, b), (1 / 4, c)))
    engine.set_gradient_accumulation_boundary(False)
    assert not engine.is_gradient_accumulation_boundary() and engine.global_steps == 1 and engine.micro_steps == 3


def test_a_window_may_be_longer_than_the_config_says_and_unmanaged():
    engine = make(k=2)
    engine.set_gradient_accumulation_boundary(False)
    for i, (x, y) in enumerate((a, b, c)):
        engine.set_gradient_accumulation_boundary(i == 2)
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
    close(moved(engine), gradient((1 / 2, a), (1 / 2, b), (1 / 2, c)))
    engine = make(k=2, managed_gradient_accumulation=False)
    for x, y in (a, b, c):
        engine.backward(F.cross_entropy(engine(x), y))
    engine.step()
    close(moved(engine), gradient((1 / 2, a), (1 / 2, b), (1 / 2, c)))
    assert engine.global_steps == 1


def test_losses_are_added_with_scale_wrt_gas_false():
    engine = make(k=2)
    for x, y in (a, b):
        loss = F.cross_entropy(engine(x), y)
        assert engine.backward(loss, scale_wrt_gas=False).item() == loss.item()
        engine.step()
    close(moved(engine), gradient((1, a), (1, b)))


@pytest.mark.parametrize("stage", range(4))
def test_what_learns_outside_of_the_engine_gets_its_grad(stage):
    engine, temperature = make(stage, k=2), torch.ones((), requires_grad=True)
    loss = F.cross_entropy(engine(a[0]) * temperature, a[1])
    engine.backward(loss)
    plain = torch.ones((), requires_grad=True)
    (F.cross_entropy(Net()(a[0]) * plain, a[1]) / 2).backward()
    torch.testing.assert_close(temperature.grad, plain.grad)


@pytest.mark.parametrize("stage", range(3))
def test_the_users_module_is_always_current_and_shares_memory(stage):
    net = Net()
    engine = make(stage, model=net)
    assert engine.module is net and all(p is q for p, q in zip(net.parameters(), engine.parameters(), strict=True))
    for _ in range(3):
        engine.backward(F.cross_entropy(engine(a[0]), a[1]))
        engine.step()
        masters = engine.train_step.params(engine.state)
        assert all(torch.equal(p, masters[n]) for n, p in net.named_parameters())


def test_at_stage_3_the_users_module_is_the_engines_and_is_closed_outside_of_its_calls():
    net = Net()
    want, shapes = {n: x.clone() for n, x in net.state_dict().items()}, {n: p.shape for n, p in net.named_parameters()}
    engine = make(3, model=net)
    assert engine.module is net
    assert (
        all(p.device == engine.device and p.shape == shapes[n] for n, p in net.named_parameters())
        and not net.last.bias.requires_grad
    )
    assert sum(p.numel() for p in engine.parameters()) == sum(x.numel() for x in want.values())
    assert list(engine.state_dict()) == [f"module.{n}" for n in want] and all(
        torch.equal(engine.module.state_dict()[n], x) for n, x in want.items()
    )
    assert torch.equal(engine.module(a[0]), Net()(a[0])) and torch.equal(engine.module.forward(a[0]), Net()(a[0]))
    with pytest.raises(
        RuntimeError,
        match=r"parameter 'first.weight' is sharded \(stage 3\) and has no values here; call engine\(...\)",
    ):
        F.linear(a[0], net.first.weight)
    with pytest.raises(RuntimeError, match="'scale' is sharded"):
        net.scale + 1


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        for f in self.layers:
            x = self.drop(f(x))
        return x


@pytest.mark.parametrize("stage", range(4))
def test_buffers_are_state_and_dropout_draws_as_in_plain_torch(stage):
    net, plain = Norm(), Norm()
    engine = make(stage, model=net)
    torch.manual_seed(7)
    got = [engine(a[0]).detach() for _ in range(2)]
    torch.manual_seed(7)
    assert all(torch.equal(x, plain(a[0]).detach()) for x in got)
    assert (
        all(torch.equal(x, y) for x, y in zip(engine.module.buffers(), plain.buffers(), strict=True))
        and net.layers[0][1].num_batches_tracked == 2
    )
    assert torch.equal(engine.eval()(a[0]), plain.eval()(a[0])) and engine.train() is engine


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", range(4))
def test_misuse_gets_one_sentence(stage):
    engine = make(stage)
    old, older = F.cross_entropy(engine(a[0]), a[1]), F.cross_entropy(engine(a[0]), a[1])
    with pytest.raises(
        RuntimeError,
        match=(
            r"^engine.step: engine.backward\(loss\) was not called since the last engine.step\(\); call it for every"
            r" micro-batch, before step$"
        ),
    ):
        engine.step()
    F.cross_entropy(engine(a[0]), a[1]).backward()
    with pytest.raises(
        RuntimeError,
        match=(
            r"^engine.step: parameter '.*' has a .grad, so loss.backward\(\) was called directly .*; write"
            r" engine.backward\(loss\) instead$"
        ),
    ):
        engine.step()
    with pytest.raises(RuntimeError, match="^optimizer.step: parameter"):
        engine.optimizer.step()
    for p in engine.parameters():
        p.grad = None
    engine.backward(F.cross_entropy(engine(a[0]), a[1]))
    with pytest.raises(RuntimeError, match='^clip_grad_norm_: .*; write "gradient_clipping" in the config'):
        nn.utils.clip_grad_norm_(engine.parameters(), 1.0)
    engine.step()
    for x in older, F.cross_entropy(engine(a[0]), a[1]) + old:
        with pytest.raises(
            RuntimeError,
            match=(
                "^backward: this loss comes from a forward before the last update, and the parameters have moved since;"
                " run engine.batch. again"
            ),
        ):
            engine.backward(x)
    with pytest.raises(
        RuntimeError,
        match=(
            "^engine.backward: this loss depends on no parameter of this engine that is trained; compute it from what"
            " engine.batch. returns"
        ),
    ):
        engine.backward(torch.ones((), requires_grad=True) * 2)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="this loss needs no gradient; was the forward under torch.no_grad"),
    ):
        engine.backward(engine(a[0]).sum())
    with pytest.raises(
        TypeError,
        match=(
            r"^engine.backward: the loss is a tensor of shape \(4, 3\) and torch.float32; give one floating 0-d tensor"
        ),
    ):
        engine.backward(engine(a[0]))
    assert engine.optimizer.zero_grad() is None and engine.zero_grad() is None and engine.optimizer.step() is None
    if stage > 1:
        with (
            pytest.raises(
                RuntimeError, match=f"^engine.no_sync: at stage {stage} gradients are sharded as they are born"
            ),
            engine.no_sync(),
        ):
            pass
    else:
        with engine.no_sync():
            engine.backward(F.cross_entropy(engine(a[0]), a[1]))
        engine.step()


def test_a_graph_used_twice_an_unknown_attribute_and_a_write_behind_the_engine():
    engine = make()
    loss = F.cross_entropy(engine(a[0]), a[1])
    engine.backward(loss)
    with pytest.raises(
        RuntimeError, match="this graph was used up by a backward before; write engine.backward.loss, retain_graph=True"
    ):
        engine.backward(loss)
    with pytest.raises(AttributeError, match="^engine.get_learning_rate: it does not exist here; "):
        engine.get_learning_rate()
    with pytest.raises(
        AttributeError, match="^engine.offload_states: it does not exist here; offload does not exist here yet"
    ):
        engine.offload_states()
    assert engine.first is engine.module.first
    with torch.no_grad():
        engine.module.first.weight.clamp_(-0.01, 0.01)
    with pytest.raises(
        RuntimeError,
        match="^engine.step: parameter 'first.weight' was written to since the last update, .*zero.GatheredParameters",
    ):
        engine.step()


def test_what_initialize_cannot_honour_is_refused_by_name():
    for kwargs, said in (
        (dict(model=None), "it needs a model"),
        (dict(mpu=object()), "mpu= asks for model parallelism"),
        (dict(config=None), "no config; write config="),
        (dict(config_params={}), "config= and config_params= both name a config"),
        (dict(model_parameters=[nn.Parameter(torch.ones(2))]), "of shape \\(2,\\), is not one of the model's"),
        (dict(model=make()), "this model is an engine already"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            deepspeed.initialize(**{"model": Net(), "config": config(), **kwargs})
    net = Net()
    engine = make(model=net)
    with pytest.raises(RuntimeError, match="belongs to another engine already"):
        make(model=net)
    assert engine.global_steps == 0

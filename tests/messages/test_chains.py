"""Chains that cannot mean what they say are refused where they are written, without any process, in one sentence with the correction."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.distributed as dist
import zoo

import funczero as fz
from funczero import P
from funczero.layout.processes import default_device

FLAT, NEST = {"data": 4}, {"node": 2, "local": 2}
g = fz.value_and_grad(zoo.loss_plain, batch=P("data"), units=("blocks",))
g2 = fz.value_and_grad(zoo.loss_plain, batch=P(("node", "local")))
lone = fz.value_and_grad(zoo.loss_plain)
acc, shard, clip, adamw = fz.accumulate, fz.shard, fz.clip_by_global_norm(1.0), fz.adamw(1e-3)
all_reduce, reduce_scatter, all_gather, scale = fz.all_reduce, fz.reduce_scatter, fz.all_gather, fz.scale_loss


class Momentum:
    """An optax-shaped pair that says nothing of itself."""

    def init(self, params):
        return ()

    def update(self, grads, state, params):
        return grads, state


def unit_norm_init(params):
    return ()


def unit_norm_update(grads, state, params):
    """Needs whole leaves: each is divided by its own norm."""
    return fz.tree.map(lambda x: x / x.square().sum().sqrt(), grads), state


class Optax:
    """optax's GradientTransformation, as far as it shows."""

    def __init__(self):
        def init_fn(params):
            return ()

        init_fn.__module__ = "optax._src.base"
        self.init = self.update = init_fn


OPTAX = Optax()

# chain, mesh, message; "..." at its end: and so on
CHAINS = {
    "clip before the sum": (
        (g, acc(4), clip, adamw), FLAT,
        "clip_by_global_norm(1): the gradient is still a partial sum over mesh axes ['data']; put all_reduce('data') or shard('data', ...) before it\n"
        "  value_and_grad(batch=P('data')) | accumulate(4) | clip_by_global_norm(1)  <- here",
    ),
    "optimizer before the sum": (
        (g, acc(4), adamw), FLAT,
        "adamw: the gradient is still a partial sum over mesh axes ['data']; put all_reduce('data') or shard('data', ...) before it\n"
        "  value_and_grad(batch=P('data')) | accumulate(4) | adamw  <- here",
    ),
    "scale before the sum": (
        (g, scale(), all_reduce("data"), adamw), FLAT,
        "scale_loss: the gradient is still a partial sum over mesh axes ['data']; put all_reduce('data') or shard('data', ...) before it\n"
        "  value_and_grad(batch=P('data')) | scale_loss  <- here",
    ),
    "one axis of two summed": (
        (g2, shard("local", adamw)), NEST,
        "adamw: the gradient is still a partial sum over mesh axes ['node']; put all_reduce('node') or shard('node', ...) before it\n"
        "  value_and_grad(batch=P(('node', 'local'))) | shard('local', | adamw  <- here",
    ),
    "one axis of two summed, at rest": (
        (shard("local", g2, acc(4), adamw),), NEST,
        "adamw: the gradient is still a partial sum over mesh axes ['node']; put all_reduce('node') or shard('node', ...) before it\n"
        "  shard('local', | value_and_grad(batch=P(('node', 'local'))) | accumulate(4) | adamw  <- here",
    ),
    "accumulate after mean": (
        (g, all_reduce("data"), fz.mean, acc(4), adamw), FLAT,
        "accumulate(4): it adds up sums, but the mean is already taken; put it further left\n"
        "  value_and_grad(batch=P('data')) | all_reduce('data') | mean | accumulate(4)  <- here",
    ),
    "accumulate after clip": (
        (g, shard("data", clip, acc(4), adamw)), FLAT,
        "accumulate(4): it adds up sums, but the mean is already taken; put it further left\n"
        "  value_and_grad(batch=P('data')) | shard('data', | mean | clip_by_global_norm(1) | accumulate(4)  <- here",
    ),
    "all_reduce after clip": (
        (g, all_reduce("data"), clip, all_reduce("data"), adamw), FLAT,
        "all_reduce('data'): it adds up sums, but the mean is already taken; put it further left\n"
        "  value_and_grad(batch=P('data')) | all_reduce('data') | mean | clip_by_global_norm(1) | all_reduce('data')  <- here",
    ),
    "all_reduce twice": ((g, all_reduce("data"), all_reduce("data"), adamw), FLAT, "all_reduce('data'): the gradient is not a partial sum over 'data': ..."),
    "all_reduce of what a bracket summed": ((shard("data", g, all_reduce("data"), adamw),), FLAT, "all_reduce('data'): the gradient is not a partial sum over 'data': ..."),
    "all_reduce of a batch not split": ((lone, all_reduce("data"), adamw), FLAT, "all_reduce('data'): the gradient is not a partial sum over 'data': ..."),
    "all_reduce over no axis": (
        (g, all_reduce("date"), adamw), FLAT,
        "all_reduce('date'): 'date' is not an axis of the mesh (data=4); write one of ['data']\n  value_and_grad(batch=P('data')) | all_reduce('date')  <- here",
    ),
    "all_gather over no axis": (
        (g, reduce_scatter("data"), adamw, all_gather("date")), FLAT,
        "all_gather('date'): 'date' is not an axis of the mesh (data=4); write one of ['data']\n"
        "  value_and_grad(batch=P('data')) | reduce_scatter('data') | mean | adamw | all_gather('date')  <- here",
    ),
    "a bracket over no axis": ((g, shard("date", adamw)), FLAT, "...'date' is not an axis of the mesh (data=4); write one of ['data']..."),
    "a batch over no axis": (
        (fz.value_and_grad(zoo.loss_plain, batch=P("date")), adamw), FLAT,
        "value_and_grad: 'date' is not an axis of the mesh (data=4); write one of ['data']...",
    ),
    "scale_loss right of a clip": (
        (g, all_reduce("data"), clip, scale(), adamw), FLAT,
        "scale_loss: a nonlinear transform left of it would see scaled gradients; put scale_loss first\n"
        "  value_and_grad(batch=P('data')) | all_reduce('data') | mean | clip_by_global_norm(1) | scale_loss  <- here",
    ),
    "scale_loss cannot weigh a stream": (
        (g, acc(2, stream=True), shard("data", scale(), adamw)), FLAT,
        "scale_loss: a streamed window cannot measure its weight beforehand; write scale_loss(weight=n), n near the weight of an update (1 for a mean loss)\n"
        "  value_and_grad(batch=P('data')) | accumulate(2, stream=True) | shard('data', | scale_loss  <- here",
    ),
    "two optimizers, one after the closed bracket": (
        (g, shard("data", adamw), adamw), FLAT,
        "adamw: it stands in another bracket than adamw before it, but an update is applied once, with the last optimizer; put both inside the same bracket\n...",
    ),
    "two optimizers in two brackets": (
        (g2, shard("local", adamw, shard("node", adamw))), NEST,
        "adamw: it stands in another bracket than adamw before it, but an update is applied once, with the last optimizer; put both inside the same bracket\n...",
    ),
    "clip after the closed bracket": (
        (g, shard("data", adamw), clip), FLAT,
        "clip_by_global_norm(1): the update is already applied; put it further left, inside the bracket and before the last optimizer\n"
        "  value_and_grad(batch=P('data')) | shard('data', | mean | adamw | ) | clip_by_global_norm(1)  <- here",
    ),
    "clip after the optimizer": (
        (g, shard("data", adamw, clip)), FLAT,
        "clip_by_global_norm(1): the update is already applied; put it further left, inside the bracket and before the last optimizer\n"
        "  value_and_grad(batch=P('data')) | shard('data', | mean | adamw | clip_by_global_norm(1)  <- here",
    ),
    "optimizer after ZeRO-3's bracket": (
        (shard("data", g, acc(4), clip), adamw), FLAT,
        "adamw: it stands after the bracket that holds the parameters at rest, which has no closing edge; move it inside: "
        "shard('data', value_and_grad, accumulate(4), clip_by_global_norm(1), adamw)\n  data[ value_and_grad | accumulate(4) | clip_by_global_norm(1) ] | adamw  <- here",
    ),
    "optimizer after two brackets": (
        (shard("local", shard("node", g2, acc(4))), adamw), NEST,
        "adamw: it stands after the bracket that holds the parameters at rest, which has no closing edge; move it inside: ...",
    ),
    "no optimizer": (
        (g, acc(4), all_reduce("data"), clip), FLAT,
        "train_step: no optimizer applies an update; end the chain with one, as adamw(3e-4)\n"
        "  value_and_grad(batch=P('data')) | accumulate(4) | all_reduce('data') | mean | clip_by_global_norm(1) | train_step  <- here",
    ),
    "no optimizer in ZeRO-3": (
        (shard("data", g),), FLAT,
        "train_step: no optimizer applies an update; end the chain with one, as adamw(3e-4)\n  shard('data', | value_and_grad(batch=P('data')) | train_step  <- here",
    ),
    "no gradient": (
        (acc(4), all_reduce("data"), adamw), FLAT,
        "chain: it begins with accumulate(4), but a chain begins with a gradient; write value_and_grad(loss_fn, batch=...) or pullback() first",
    ),
    "a loss is no gradient": (
        (zoo.loss_plain, all_reduce("data"), adamw), FLAT,
        "chain: it begins with loss_plain, but a chain begins with a gradient; write value_and_grad(loss_fn, batch=...) or pullback() first",
    ),
    "a bracket whose gradient is not first": (
        (shard("data", acc(4), g, adamw),), FLAT,
        "chain: it begins with shard('data', accumulate(4), value_and_grad, adamw), but a chain begins with a gradient; "
        "write value_and_grad(loss_fn, batch=...) or pullback() first",
    ),
    "nothing": ((), FLAT, "chain: it begins with nothing, but a chain begins with a gradient; write value_and_grad(loss_fn, batch=...) or pullback() first"),
    "two gradients": (
        (g, all_reduce("data"), g, adamw), FLAT,
        "value_and_grad: a chain has one gradient, at its left end; write a second chain for a second loss\n"
        "  value_and_grad(batch=P('data')) | all_reduce('data') | value_and_grad  <- here",
    ),
    "no transform": (
        (g, all_reduce("data"), 3, adamw), FLAT,
        "int: this is neither a transform nor an optimizer; write a function Grad -> Grad or an (init, update) pair\n"
        "  value_and_grad(batch=P('data')) | all_reduce('data') | int  <- here",
    ),
    "reduce_scatter without its bracket": (
        (g, reduce_scatter("data"), adamw), FLAT,
        "train_step: the new parameters are still split over ['data']; write shard('data', ...) around what reduce_scatter opened, or all_gather('data') after it\n"
        "  value_and_grad(batch=P('data')) | reduce_scatter('data') | mean | adamw | train_step  <- here",
    ),
    "reduce_scatter left open in a bracket": (
        (g2, shard("local", reduce_scatter("node"), adamw)), NEST,
        "...shard('local') closes, but the leaves are sharded over ['local', 'node']; close what was opened inside first\n"
        "  value_and_grad(batch=P(('node', 'local'))) | shard('local', | reduce_scatter('node') | mean | adamw | )  <- here",
    ),
    "all_gather of what is whole": (
        (g, all_reduce("data"), adamw, all_gather("data")), FLAT,
        "all_gather('data'): the leaves are whole here, with nothing to join over 'data'; leave it out\n"
        "  value_and_grad(batch=P('data')) | all_reduce('data') | mean | adamw | all_gather('data')  <- here",
    ),
    "all_gather of what rests sharded": (
        (shard("data", g, adamw, all_gather("data")),), FLAT,
        "all_gather('data'): the leaves are sharded over ['data'] here, with nothing to join over 'data'; leave it out\n"
        "  shard('data', | value_and_grad(batch=P('data')) | mean | adamw | all_gather('data')  <- here",
    ),
    "all_gather of the outer axis first": (
        (g2, reduce_scatter("local"), reduce_scatter("node"), adamw, all_gather("local"), all_gather("node")), NEST,
        "all_gather('local'): the leaves are sharded over ['local', 'node'] here, with nothing to join over 'local'; leave it out\n...",
    ),
    "two streams": (
        (g, acc(2, stream=True), acc(2, stream=True), all_reduce("data"), adamw), FLAT,
        "accumulate(2, stream=True): an accumulate left of it streams, and only the last one of a chain may; write stream=True here instead\n"
        "  value_and_grad(batch=P('data')) | accumulate(2, stream=True) | accumulate(2, stream=True)  <- here",
    ),
    "a stream inside a loop": (
        (g, acc(2, stream=True), shard("data", acc(4), adamw)), FLAT,
        "accumulate(4): an accumulate left of it streams, and only the last one of a chain may; write stream=True here instead\n"
        "  value_and_grad(batch=P('data')) | accumulate(2, stream=True) | shard('data', | accumulate(4)  <- here",
    ),
    "a bracket over an axis that no batch is split over": ((lone, shard("data", adamw)), FLAT, "...the gradient is not a partial sum over 'data': ..."),
    "ZeRO-3 over an axis that no batch is split over": (
        (shard("data", lone, adamw),), FLAT,
        "shard('data'): the gradient is not a partial sum over 'data', because the batch is not split over it; write value_and_grad(..., batch=P('data'))\n"
        "  data[ value_and_grad  <- here",
    ),
    "a bracket twice": ((g, shard("data", shard("data", adamw))), FLAT, "...the gradient is not a partial sum over 'data': ..."),
    "a bracket twice, at rest": (
        (shard("data", shard("data", g, adamw)),), FLAT,
        "shard('data'): 'data' is bracketed twice; a mesh axis is cut once\n  data[ data[ value_and_grad  <- here",
    ),
    "a bracket twice, around the gradient and right of it": ((shard("data", g, shard("data", adamw)),), FLAT, "...the gradient is not a partial sum over 'data': ..."),
    "a bracket after the update": (
        (g, all_reduce("data"), adamw, shard("data", clip)), FLAT,
        "shard('data', ...): the update is already applied; put it further left, around the optimizer\n"
        "  value_and_grad(batch=P('data')) | all_reduce('data') | mean | adamw | shard('data', ...)  <- here",
    ),
    "an undeclared pair in a bracket": (
        (g, shard("data", Momentum())), FLAT,
        "Momentum: nothing says that it works value by value, but the leaves are cut over ['data'] here; write fz.lift(pair, needs=...): 'elementwise' if every value of its "
        "updates and state depends on its own place alone, 'leafwise' if each leaf moves by itself, 'whole' if it needs all at once; or a chain without shard (stage 0), "
        "as all_reduce('data') in its place\n"
        "  value_and_grad(batch=P('data')) | shard('data', | mean | Momentum  <- here",
    ),
    "an undeclared pair, lifted, in a bracket": (
        (g, shard("data", fz.lift((unit_norm_init, unit_norm_update), name="unit_norm"))), FLAT, "unit_norm: nothing says that it works value by value, but ...",
    ),
    "a pair declared to need whole leaves, in a bracket": (
        (g, shard("data", fz.lift((unit_norm_init, unit_norm_update), name="unit_norm", elementwise=False))), FLAT,
        "unit_norm: it needs whole leaves (elementwise=False), but they are cut over ['data'] here; write a chain without shard (stage 0), as all_reduce('data') in its place, "
        "fz.lift(pair, needs='leafwise') if each leaf moves by itself or needs='whole' if it needs all at once, or an optimizer that works value by value, as fz.adamw(lr)\n  value_and_grad(batch=P('data')) | shard('data', | mean | unit_norm  <- here",
    ),
    "a torch optimizer": (
        (g, all_reduce("data"), torch.optim.AdamW([torch.zeros(1)])), FLAT,
        "AdamW: a torch optimizer steps on tensors of its own, but here state is a value; write fz.adamw(lr), or hand it to fz.deepspeed.initialize(optimizer=...)\n"
        "  value_and_grad(batch=P('data')) | all_reduce('data') | AdamW  <- here",
    ),
    "a class of torch's optimizers": (
        (g, shard("data", torch.optim.RMSprop)), FLAT,
        "RMSprop: a torch optimizer steps on tensors of its own, but here state is a value; write fz.from_torch('RMSprop', lr), or hand it to fz.deepspeed.initialize(...",
    ),
    "a scheduler of torch": (
        (g, all_reduce("data"), adamw, torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 2)), FLAT,
        "StepLR: a scheduler of torch is no part of a chain; write the rate into the optimizer: fz.adamw(fz.schedules.from_torch('StepLR', lr, ...))\n...",
    ),
    "an optax transform": (
        (g, all_reduce("data"), OPTAX), FLAT,
        "Optax: a transform of optax computes on jax arrays, and leaves are torch tensors here; write fz.adamw(lr), or the same (init, update) pair in torch\n...",
    ),
}  # fmt: skip

CALLS = {
    "a batch split in two dims": (
        lambda: fz.value_and_grad(zoo.loss_plain, batch=P("node", "data")), fz.ChainError,
        "value_and_grad: batch= is P('node', 'data'), which splits two dims, but rows lie in one; write P(('node', 'data'))",
    ),
    "a leaf of a batch split in two dims": (
        lambda: fz.value_and_grad(zoo.loss_plain, batch={"x": P("data", "node")}), fz.ChainError,
        "value_and_grad: batch= has 'x': P('data', 'node'), which splits two dims, but rows lie in one; write P(('data', 'node'))",
    ),
    "leaves of a batch over different axes": (
        lambda: fz.value_and_grad(zoo.loss_plain, batch={"x": P("data"), "y": P("node")}), fz.ChainError,
        "value_and_grad: batch= splits 'x' over ['data'], but 'y' over ['node']; write the same axes for every leaf with rows, and P() for the others",
    ),
    "a leaf of a batch with None for a spec": (
        lambda: fz.value_and_grad(zoo.loss_plain, batch={"x": P("data"), "y": None}), fz.ChainError,
        "value_and_grad: batch= has 'y': None, which is no spec; write P('data') for rows, P() for what is whole",
    ),
    "a pullback of time-major rows": (
        lambda: fz.pullback(P(None, "data")), fz.ChainError,
        "pullback: batch=P(None, 'data'), but its rows were read by a forward elsewhere, and nothing of them is dealt or cut here; write the axes alone: batch=P(('data',))",
    ),
    "an optax transform, lifted": (
        lambda: fz.lift(OPTAX), TypeError,
        "lift: a transform of optax computes on jax arrays, and leaves are torch tensors here; write fz.adamw(lr), or the same (init, update) pair in torch",
    ),
    "nothing in a bracket": (lambda: shard("data"), fz.ChainError, "shard('data'): there is nothing inside it; write the optimizer inside: shard('data', adamw(...))"),
    "a rule without P": (
        lambda: shard("data", adamw, rules=[("w1", "data")]), TypeError,
        "shard('data'): rule ('w1', 'data') is not a pair of a regex and a P; write rules=[('w1$', P(None, 'data'))]",
    ),
    "accumulate(0)": (lambda: acc(0), ValueError, "accumulate: k=0 is not a number of micro-batches; write an int of at least 1"),
    "accumulate(True)": (lambda: acc(True), ValueError, "accumulate: k=True is not a number of micro-batches; write an int of at least 1"),
    "accumulate(2.0)": (lambda: acc(2.0), ValueError, "accumulate: k=2.0 is not a number of micro-batches; write an int of at least 1"),
    "clip(0)": (lambda: fz.clip_by_global_norm(0), ValueError, "clip_by_global_norm: limit=0 is not a positive norm; leave the transform out to clip nothing"),
    "clip_by_value(-1)": (lambda: fz.clip_by_value(-1), ValueError, "clip_by_value: limit=-1 is not positive; leave the transform out to clip nothing"),
    "scale_loss(0)": (
        lambda: scale(init=0), ValueError,
        "scale_loss: init=0, weight=None, window=1000, hysteresis=2, floor=1.0 must all be positive",
    ),
    "adamw(b1=1)": (lambda: fz.adamw(1e-3, b1=1.0), ValueError, "adamw: b1=1.0 is not below 1; write a number in [0, 1)"),
    "sgd(momentum=1)": (lambda: fz.sgd(1e-3, momentum=1.0), ValueError, "sgd: momentum=1.0 is not below 1; write a number in [0, 1)"),
    "nesterov without momentum": (
        lambda: fz.sgd(1e-3, nesterov=True), ValueError,
        "sgd: momentum=0.0 leaves nesterov=True nothing to look ahead with; write a momentum above 0, or leave nesterov out",
    ),
    "an optimizer without its arguments": (
        lambda: fz.train_step(g, all_reduce("data"), fz.adamw, mesh=FLAT), TypeError, "adamw: it stands in a chain without its arguments; write fz.adamw(lr) there",
    ),
    "adamw('1e-3')": (lambda: fz.adamw("1e-3"), TypeError, "adamw: lr='1e-3' is a string and no number; write a finite number of at least 0"),
    "adamw(-1)": (lambda: fz.adamw(-1), ValueError, "adamw: lr=-1 is below 0; write a finite number of at least 0"),
    "clip('1')": (lambda: fz.clip_by_global_norm("1"), TypeError, "clip_by_global_norm: limit='1' is a string and no number; write a finite number"),
    "clip_by_value(nan)": (lambda: fz.clip_by_value(float("nan")), ValueError, "clip_by_value: limit=nan is not finite; write a finite number"),
    "scale_loss('dynamic')": (lambda: scale("dynamic"), TypeError, "scale_loss: init='dynamic' is a string and no number; write a finite number"),
    "stage 4": (lambda: fz.zero(g, adamw, stage=4), ValueError, "zero: stage=4 does not exist; write 0, 1, 2 or 3"),
    "warmup past the end": (
        lambda: fz.schedules.warmup_cosine(1.0, 10, 5), ValueError,
        "warmup_cosine: warmup=10 is not within 0 and total=5 updates; write 0 <= warmup <= total",
    ),
    "dropout of all": (lambda: fz.rng.dropout(torch.ones(3), 1.0, 0), ValueError, "dropout: p=1.0 is not a probability below 1"),
    "P(0)": (lambda: P(0), TypeError, "P: 0 is not a mesh axis; write a name, a tuple of names or None for every tensor dim"),
    "an unknown dtype": (
        lambda: fz.Policy.parse("int8"), ValueError,
        "policy: 'int8' is not a dtype of training; write one of float64, float32, bfloat16, float16",
    ),
    "an unknown part of a policy": (
        lambda: fz.Policy.parse("param=float32"), ValueError,
        "policy: 'param' is not a part of a policy; write params=...,compute=...,accumulate=...",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """A mesh of four in one process: building a chain must not join, make or ask for anything."""

    def refuse(*args, **kwargs):
        raise AssertionError("a chain was built with processes")

    for name in ("init_process_group", "new_group", "TCPStore"):
        monkeypatch.setattr(dist, name, refuse)


def says(message, error):
    """The whole message, but for what an ellipsis leaves open."""
    begin, *end = message.split("...") if message.startswith("...") or message.endswith("...") else (message,)
    return (
        str(error) == message
        if not end
        else all(part in str(error) for part in (begin, *end)) and str(error).startswith(begin)
    )


@pytest.mark.parametrize("name", CHAINS)
def test_a_wrong_chain_is_refused_where_it_is_written(name):
    parts, mesh, message = CHAINS[name]
    with pytest.raises(fz.ChainError) as caught:
        fz.train_step(*parts, mesh=mesh)
    assert says(message, caught.value), caught.value


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_part_is_refused_by_its_maker(name):
    call, error, message = CALLS[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("mesh", [FLAT, NEST, {"data": 1}], ids=str)
def test_right_chains_are_built_and_printed_without_processes(mesh, monkeypatch):
    """Though a launcher has promised them."""
    world = {"RANK": "0", "WORLD_SIZE": str(prod(mesh.values())), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    tables = (
        (zoo.flat_chains, zoo.source(("data",))) if "data" in mesh else (zoo.nested_chains, zoo.source(tuple(mesh)))
    )
    for parts, _ in tables[0](tables[1], 4, zoo.tx(scale=True)).values():
        step = fz.train_step(*parts, mesh=mesh)
        assert (
            str(step).splitlines()[0]
            == f"train_step on {', '.join(f'{a}={n}' for a, n in mesh.items())} ({default_device().type}),"
            " params=float32,compute=float32,accumulate=float32"
        )
        assert step.specs(zoo.params())["grads"]["gain"] == P()

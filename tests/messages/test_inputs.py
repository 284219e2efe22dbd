"""Bad input is refused in one sentence that names it: meshes, batches, losses, parameters, units, states, environments."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zoo
from torch import ones
from torch.distributed.device_mesh import init_device_mesh

import funczero as fz
from funczero import P

MESH = {"data": -1}
adamw = fz.adamw(1e-3)


def params():
    return {"w": ones(3, 2), "blocks": [{"v": ones(2, 2)} for _ in range(2)]}


def block(p, x):
    return torch.tanh(x @ p["v"])


def plain(p, b):
    return fz.layers(block, p["blocks"], b["x"] @ p["w"]).sum(), torch.tensor(float(len(b["x"])))


def rows(n=4):
    return {"x": ones(n, 3)}


def step(loss=plain, k=1, stream=False, stage=3, tx=(adamw,), mesh=None, donate=False, **kw):
    g = fz.value_and_grad(loss, batch=P("data"), **kw)
    acc = (fz.accumulate(k, stream=stream),) if k > 1 or stream else ()
    parts = (fz.shard("data", g, *acc, *tx),) if stage == 3 else (g, *acc, fz.all_reduce("data"), *tx)
    made = fz.train_step(*parts, mesh=mesh or MESH)
    return fz.donate(made) if donate else made


def run(s, batch=None, p=None):
    return s(s.init(p or params()), batch or s.local_rows(rows()))


def returns(*value, **kw):
    return lambda: run(step(lambda p, b: value if len(value) > 1 else value[0], **kw))


def returns_by(fn, **kw):
    return lambda: run(step(lambda p, b: fn(p), **kw))


def sparse_loss(p, b):
    return F.embedding(torch.zeros(2, dtype=torch.int64), p["w"], sparse=True).sum(), ones(())


def sparse_blocks(p, b):
    look = lambda q, x: x + F.embedding(torch.zeros(len(x), dtype=torch.int64), q["v"], sparse=True)
    return fz.layers(look, p["blocks"], b["x"] @ p["w"]).sum(), ones(())


def named_rule(regex):
    return fz.train_step(
        fz.value_and_grad(plain, batch=P("data")), fz.shard("data", adamw, rules=[(regex, P())]), mesh={"data": 2}
    ).specs(params())


def tied_loss():
    def loss(p, b):
        return plain(p, b)

    loss.ties = {"blocks/1/v": "blocks/0/v"}
    return loss


def used_up(use):
    s = step(donate=True)
    state = s.init(params())
    s(state, rows())
    return use(s, state)


def overfull():
    s = step(k=2, stream=True)
    state = s.init(params())
    for _ in range(3):
        state, _ = s(state, rows())


def captures(p, b):
    x = b["x"] @ p["w"]
    return fz.layers(lambda q, y: block(q, y) + x.sum(), p["blocks"], x).sum(), ones(())


def captures_closed(p, b):
    first = p["blocks"][0]["v"]
    return fz.layers(lambda q, y: block(q, y) @ first, p["blocks"], b["x"] @ p["w"]).sum(), ones(())


def closed(p, b):
    return p["blocks"][0]["v"].sum(), ones(())


def second_order(p, b):
    loss = fz.layers(block, p["blocks"], b["x"] @ p["w"], remat=True).sum()
    (g,) = torch.autograd.grad(loss, p["w"], create_graph=True)
    return g.square().sum(), ones(())


def rule(spec, **kw):
    return fz.train_step(
        fz.value_and_grad(plain, batch=P("data")),
        fz.shard("data", adamw, rules=[("^w$", spec)]),
        mesh={"data": 2},
        **kw,
    ).specs(params())


def conflict():
    g = fz.value_and_grad(plain, batch=P(("node", "local")))
    inner = fz.shard("node", adamw, rules=[("^w$", P("node"))])
    return fz.train_step(
        g, fz.shard("local", inner, rules=[("^w$", P("local", "node"))]), mesh={"node": 2, "local": 2}
    ).specs(params())


def nameless_mesh():
    fz.make_mesh({"data": 1})
    return fz.train_step(
        fz.value_and_grad(plain, batch=P("data")), fz.all_reduce("data"), adamw, mesh=init_device_mesh("cpu", (1,))
    )


def pulls_nothing():
    s = fz.train_step(fz.shard("data", fz.pullback(P("data")), adamw), mesh=MESH)
    return s(s.init(params()), rows())


WANT = "(sum of losses, sum of weights)"
DONATED = (
    "step: this state was donated at step 0 and its memory is in use; go on with the state that step(...) returned,"
    " restore a checkpoint if that call failed, or leave fz.donate out"
)
INPUTS = {
    "a mesh of another world": (
        lambda: run(step(mesh={"data": 4})), ValueError,
        "mesh {'data': 4} needs 4 processes, but this world has 1; start torchrun --nproc-per-node=4, or write {'data': -1}",
    ),
    "a made mesh of another world": (
        lambda: fz.make_mesh({"node": 2, "local": 2}), ValueError,
        "mesh {'node': 2, 'local': 2} needs 4 processes, but this world has 1; start torchrun --nproc-per-node=4, or write {'node': -1}",
    ),
    "-1 twice": (lambda: step(mesh={"data": -1, "local": -1}), ValueError, "mesh: only one axis can be -1, but ['data', 'local'] are; write the size of the others"),
    "-1 that does not divide": (
        lambda: step(mesh={"data": -1, "local": 2}), ValueError,
        "mesh {'data': -1, 'local': 2}: 1 processes do not divide into 2 for the axes with a size; start a multiple of 2 processes",
    ),
    "no processes": (
        lambda: step(mesh={"data": 0}), ValueError,
        "mesh: axis 'data' has size 0; write a positive number of processes, or -1 for all that are left",
    ),
    "a number for a mesh": (lambda: step(mesh=4), TypeError, "mesh: 4 is neither a dict of axis sizes nor a DeviceMesh; write mesh={'data': -1}"),
    "a mesh without names": (nameless_mesh, ValueError, "mesh: this DeviceMesh has no mesh_dim_names; make it with fz.make_mesh({'data': -1})"),
    "rows to deal": (
        lambda: step(k=3).local_rows(rows(4)), ValueError,
        "local_rows: a batch of 4 rows does not divide into 3 equal parts; give a multiple of 3 rows",
    ),
    "rows to accumulate": (
        lambda: run(step(k=3), rows(4)), ValueError,
        "accumulate(3): a batch of 4 rows does not divide into 3 equal parts; give a multiple of 3 rows",
    ),
    "unequal rows": (
        lambda: step(k=2).local_rows({"x": ones(4, 3), "y": ones(2)}), ValueError,
        "local_rows: the tensors of a batch disagree on their rows: 'x' has 4 in dim 0, but 'y' has 2 in dim 0; in batch= write P() for a leaf that has no rows",
    ),
    "numbers in a batch, one a row": (
        lambda: step(k=2).local_rows({"x": ones(4, 3), "y": [1, 2, 3, 4]}), TypeError,
        "local_rows: 'y' of the batch is a list of numbers or text, which has no rows to cut; give a tensor, or in batch= write P() for 'y' if it belongs to all rows",
    ),
    "an object in a batch": (
        lambda: step(k=2).local_rows({"x": ones(4, 3), "y": {"z": object()}}), TypeError,
        "local_rows: 'y/z' of the batch is a object, which has no rows to cut; give a tensor, or in batch= write P() for 'y/z' if it belongs to all rows",
    ),
    "a packed sequence in a batch": (
        lambda: step(k=2).local_rows({"x": torch.nn.utils.rnn.pack_sequence([ones(3), ones(2)])}), TypeError,
        "local_rows: 'x' of the batch is a PackedSequence, which has no rows to cut; give a tensor, or in batch= write P() for 'x' if it belongs to all rows",
    ),
    "a sparse leaf of a batch": (
        lambda: step(k=2).local_rows({"x": ones(4, 3).to_sparse()}), TypeError,
        "local_rows: 'x' of the batch is sparse or nested, and is not cut; give it dense, or in batch= write P() for 'x' if it belongs to all rows",
    ),
    "a scalar loss": (
        returns(ones(())), TypeError,
        f"value_and_grad: the loss function returned one tensor of shape (), but an update needs {WANT}; "
        "return `nll.sum(), mask.sum()`, or wrap a mean over rows: value_and_grad(fz.per_row(loss_fn), ...)",
    ),
    "a loss by row": (
        returns(ones(4), ones(4)), TypeError,
        "value_and_grad: the loss function returned (a tensor of shape (4,), a tensor of shape (4,)); "
        "both are 0-d: the sum of losses and the sum of weights of this micro-batch",
    ),
    "a weight by row": (
        returns(ones(()), ones(4)), TypeError,
        "value_and_grad: the loss function returned (a tensor of shape (), a tensor of shape (4,)); "
        "both are 0-d: the sum of losses and the sum of weights of this micro-batch",
    ),
    "three values": (
        returns(ones(()), ones(()), ones(())), TypeError,
        f"value_and_grad: the loss function returned (a tensor of shape (), a tensor of shape (), a tensor of shape ()); return {WANT}",
    ),
    "no aux": (
        returns(ones(()), ones(()), has_aux=True), TypeError,
        "value_and_grad: the loss function returned (a tensor of shape (), a tensor of shape ()); return (sum of losses, sum of weights, aux)",
    ),
    "aux by row": (
        returns_by(lambda p: (p["w"].sum(), ones(()), {"hits": ones(4)}), has_aux=True), TypeError,
        "value_and_grad: aux 'hits' is a tensor of shape (4,) and float32, but what has no rule is a 0-d sum; "
        "write x.sum(), or has_aux=[('hits', 'rows')] for this rank's rows, 'cat' for all ranks', 'sum' to add it",
    ),
    "aux in words": (
        returns_by(lambda p: (p["w"].sum(), ones(()), "fine"), has_aux=True), TypeError,
        "value_and_grad: aux is a string, which cannot be added or joined; return numbers and tensors, or leave it out",
    ),
    "a sparse gradient": (
        lambda: run(step(sparse_loss)), TypeError,
        "value_and_grad: the gradient of 'w' is sparse, but gradients are added and cut as dense rows; write sparse=False in its embedding",
    ),
    "a sparse gradient of a block": (
        lambda: run(step(sparse_blocks, units="blocks")), TypeError,
        "value_and_grad: the gradient of a parameter is sparse, but gradients are added and cut as dense rows; write sparse=False in its embedding",
    ),
    "a negative weight": (
        returns_by(lambda p: (p["w"].sum(), -ones(()))), ValueError,
        "value_and_grad: the weights of update 0 add up to -1, but a weight counts examples and is not negative; "
        "return (sum of losses, sum of weights) with a weight above 0, or 0 where nothing counts",
    ),
    "a regex of freeze that finds nothing": (
        lambda: run(step(tx=(fz.freeze("haed"), adamw))), ValueError,
        "freeze('haed'): the regex 'haed' matches no parameter; their paths begin with ['blocks', 'w']; correct it, or leave it out",
    ),
    "a regex of trainable that finds nothing": (
        lambda: run(step(trainable="^block/")), ValueError,
        "value_and_grad(trainable=...): the regex '^block/' matches no parameter; their paths begin with ['blocks', 'w']; correct it, or leave it out",
    ),
    "a regex of a pullback that finds nothing": (
        lambda: fz.train_step(fz.shard("data", fz.pullback(P("data"), trainable="v$x"), adamw), mesh=MESH).init(params()), ValueError,
        "pullback(trainable=...): the regex 'v$x' matches no parameter; their paths begin with ['blocks', 'w']; correct it, or leave it out",
    ),
    "a rule that finds nothing": (
        lambda: named_rule("^W$"), ValueError,
        "shard('data', rules=...): the regex '^W$' matches no parameter; their paths begin with ['blocks', 'w']; correct it, or leave it out",
    ),
    "names of one parameter with two values": (
        lambda: run(step(tied_loss()), p={"w": ones(3, 2), "blocks": [{"v": ones(2, 2)}, {"v": 2 * ones(2, 2)}]}), ValueError,
        "init: 'blocks/0/v' and 'blocks/1/v' are one parameter of the module, but here they differ; give both the same values",
    ),
    "words in a batch, one a row": (
        lambda: step().local_rows({"x": ones(4, 3), "y": ["a"] * 4}), TypeError,
        "local_rows: 'y' of the batch is a list of numbers or text, which has no rows to cut; give a tensor, or in batch= write P() for 'y' if it belongs to all rows",
    ),
    "a batch of nothing": (
        lambda: step().local_rows({"x": None}), ValueError,
        "local_rows: the batch holds no tensor; give one with rows in dim 0",
    ),
    "no loss": (returns(None), TypeError, f"value_and_grad: the loss function returned a NoneType; return {WANT}"),
    "integers as parameters": (
        lambda: step().init({"w": ones(3, 2), "n": {"m": ones(2, dtype=torch.int64)}}), TypeError,
        "init: parameter 'n/m' is a torch.int64 tensor; parameters are floating tensors, other values go into the batch or the loss function",
    ),
    "None as a parameter": (
        lambda: step().init({"w": ones(3, 2), "n": None}), TypeError,
        "init: parameter 'n' is a NoneType; parameters are floating tensors, other values go into the batch or the loss function",
    ),
    "no parameters": (lambda: step().init({}), ValueError, "init: the parameters hold no tensor; give a pytree with at least one"),
    "parameters wider than the policy": (
        lambda: step().init({"w": ones(3, 2, dtype=torch.float64)}), TypeError,
        "init: parameter 'w' is float64, but the policy keeps masters in float32; write policy='float64', or cast the parameters first",
    ),
    "units that name nothing": (
        lambda: step(units=("layers",)).init(params()), ValueError,
        "value_and_grad: units='layers' names no list of blocks among the parameters; paths begin with ['blocks', 'w']",
    ),
    "units that name half a key": (
        lambda: step(units=("block",)).init(params()), ValueError,
        "value_and_grad: units='block' names no list of blocks among the parameters; paths begin with ['blocks', 'w']",
    ),
    "a rule of too many dims": (
        lambda: rule(P(None, None, "data")), ValueError,
        "shard('data'): rule P(None, None, 'data') has 3 dims, but parameter 'w' has shape (3, 2); write at most 2 entries",
    ),
    "a rule against an outer one": (
        conflict, ValueError,
        "shard('node'): rule P('node') cuts dim 0 of 'w' over 'node', but an outer bracket's rule says otherwise; change one of them",
    ),
    "a block that captures": (
        lambda: run(step(captures)), TypeError,
        "fz.layers: the block captures a tensor of shape (4, 2), which needs a gradient; hand it in: fz.layers(block, blocks, x, it)",
    ),
    "a block that captures, at the seam": (
        lambda: run(step(captures, units="blocks")), TypeError,
        "fz.layers: the block captures a tensor of shape (4, 2), which needs a gradient; hand it in: fz.layers(block, blocks, x, it)",
    ),
    "a block that captures what is closed": (
        lambda: run(step(captures_closed, units="blocks")), TypeError,
        "fz.layers: the block captures parameter 'blocks/0/v', which needs a gradient; hand it in: fz.layers(block, blocks, x, it)",
    ),
    "a closed parameter": (
        lambda: run(step(closed, units="blocks")), TypeError,
        "parameter 'blocks/0/v' is inside a unit that is not open; run its blocks with fz.layers(block, params[...], x) or open it with fz.gather(params[...])",
    ),
    "a closed parameter where nothing is sharded": (
        lambda: run(step(closed, units="blocks", stage=0)), TypeError,
        "parameter 'blocks/0/v' is inside a unit that is not open; run its blocks with fz.layers(block, params[...], x) or open it with fz.gather(params[...])",
    ),
    "one block of two units": (
        lambda: run(step(lambda p, b: (fz.layers(lambda q, x: x @ q[0]["v"], [p["blocks"]], b["x"] @ p["w"]).sum(), ones(())), units="blocks")), TypeError,
        "fz.layers: one block holds parameters of the units ['blocks/0', 'blocks/1']; give it a list with one tree a block",
    ),
    "a donated state": (lambda: used_up(lambda s, state: s(state, rows())), RuntimeError, DONATED),
    "the parameters of a donated state": (lambda: used_up(lambda s, state: s.params(state)), RuntimeError, DONATED),
    "a loss of a donated state": (lambda: used_up(lambda s, state: s.eval(plain)(state, rows())), RuntimeError, DONATED),
    "parameters for a state": (
        lambda: step()(params(), rows()), TypeError,
        "step: its first argument is a TrainState from step.init(params), but this is a dict",
    ),
    "whole parameters in a state": (
        lambda: (lambda s, state: s(state._replace(params=s.params(state)), rows()))(*(lambda s: (s, s.init(params())))(step())), TypeError,
        "step: its masters are a dict, but a state holds this rank's parts of them (Slots); "
        "write step.init(params) for whole parameters, or state.params.map(fn) to change them",
    ),
    "a window without micro-batches": (
        lambda: (lambda s: s(s.init(params()), None))(step(k=2, stream=True)), ValueError,
        "accumulate(2, stream=True): there is nothing to hand over, because no micro-batch came since the last update; call step(state, micro_batch) first",
    ),
    "a window overfull": (overfull, ValueError, "accumulate(2, stream=True): the window already holds 2 micro-batches; call step(state, None) to update"),
    "a batch for pullback": (
        pulls_nothing, TypeError,
        "pullback: its batch is (pull, loss, weight), but this is a dict; write step(state, (fz.pull(loss, views), loss, weight))",
    ),
    "rates without a default": (
        lambda: run(step(tx=(fz.adamw([("blocks", 1e-3)]),))), ValueError,
        "adamw: lr: no rule matches parameter 'w'; end the rules with ('', default)",
    ),
    "a tree of rates with a word": (
        lambda: run(step(tx=(fz.adamw({"w": "fast", "blocks": [{"v": 1}, {"v": 1}]}),))), TypeError,
        "adamw: lr at 'w': lr='fast' is a string and no number; write a finite number of at least 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_bad_input_is_named(name):
    call, error, message = INPUTS[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def each_rank(call):
    """The message that this rank raised."""
    with pytest.raises(Exception) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def wrong_meshes():
    return [each_rank(lambda m=m: run(step(mesh=m))) for m in ({"data": 4}, {"data": 1})]


def sparse_units():
    return [each_rank(lambda s=s: run(step(sparse_blocks, units="blocks", stage=s))) for s in (0, 3)]


def second_orders():
    return each_rank(lambda: run(step(second_order, units="blocks")))


def test_every_rank_says_which_world_it_is_in(run_world):
    assert zoo.everywhere(run_world, 2, wrong_meshes) == [
        (
            "ValueError: mesh {'data': 4} needs 4 processes, but this world has 2; start torchrun --nproc-per-node=4,"
            " or write {'data': -1}"
        ),
        (
            "ValueError: mesh {'data': 1} needs 1 processes, but this world has 2; start torchrun --nproc-per-node=1,"
            " or write {'data': -1}"
        ),
    ]


def test_a_sparse_gradient_is_refused_on_every_rank(run_world):
    words = (
        "TypeError: value_and_grad: the gradient of {} is sparse, but gradients are added and cut as dense rows; write"
        " sparse=False in its embedding"
    )
    assert zoo.everywhere(run_world, 2, sparse_units) == [words.format("'blocks/1/v'")] * 2


def test_a_second_derivative_through_blocks_that_run_again_is_refused(run_world):
    said = zoo.everywhere(run_world, 2, second_orders)
    assert (
        said
        == "RuntimeError: value_and_grad(units=...): a block that runs again in the backward (remat) is first-order"
        " only, "
        "but create_graph=True asks for a second derivative; leave remat out for this loss"
    )


HALVES = {
    "a rank alone": (
        {"RANK": "0"},
        "init_distributed: the environment names ['RANK'] but not ['WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT']; start with torchrun, or unset RANK for a world of one",
    ),
    "no port": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
        "init_distributed: the environment names ['RANK', 'WORLD_SIZE', 'MASTER_ADDR'] but not ['MASTER_PORT']; start with torchrun, or unset RANK for a world of one",
    ),
    "a rank outside": (
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "init_distributed: RANK='2' and WORLD_SIZE='2' are not a rank below a world size; start with torchrun",
    ),
    "a rank of words": (
        {"RANK": "first", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "init_distributed: RANK='first' and WORLD_SIZE='2' are not a rank below a world size; start with torchrun",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
def test_half_an_environment_is_refused(monkeypatch, name):
    environment, message = HALVES[name]
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError) as caught:
        fz.init_distributed()
    assert str(caught.value) == message


def test_debug_names_the_first_leaf_that_is_not_finite(caplog):
    def loss(p, b):
        return (p["b"] * b["x"]).sum() + p["a"].sum(), ones(())

    s = fz.train_step(fz.value_and_grad(loss, batch=P("data")), fz.all_reduce("data"), adamw, mesh=MESH, debug=True)
    state = s.init({"a": ones(2), "b": ones(3)})
    with caplog.at_level(logging.WARNING, logger="absl"):
        state, m = s(state, {"x": torch.tensor([1.0, torch.inf, 1.0])})
    assert not m.ok and "step 0: the gradient of 'b' is not finite on rank 0; the update is skipped" in caplog.text

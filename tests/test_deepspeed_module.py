"""At stage 3 the engine runs the user's own module: what a user sets on it counts, and what is closed says so."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
import torch.nn.functional as F
import zoo
from cover import EACH, cover
from engines import Net, config
from torch import nn

import funczero.deepspeed as deepspeed
from funczero.deepspeed.engine.held import ZeroParamStatus
from funczero.testing import tree_hash

SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0}


class Layer(nn.Module):
    def __init__(self, n=8):
        super().__init__()
        self.lin, self.drop, self.norm = nn.Linear(n, n), nn.Dropout(0.5), nn.BatchNorm1d(n)
        self.gain, self.gradient_checkpointing = 1.0, False

    def forward(self, x, twice=False):
        x = x + self.gain * self.drop(torch.tanh(self.norm(self.lin(x))))
        return torch.tanh(self.lin(x)) if twice else x


class Odd(nn.Module):
    """A tied head read by its parent, a list that is run twice, a recurrent layer, a method that reads parameters,
    buffers.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def encode(self, ids):
        return self.rnn(self.embed(ids))[0][:, -1]

    def penalty(self):
        return (self.embed.weight**2).sum()

    def forward(self, ids, *, temperature: float = 1.0):
        x = self.encode(ids)
        for _ in range(2):
            for f in self.layers:
                x = f(x)
        return (self.head(x) + F.linear(x, self.embed.weight)) / temperature


def data(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(11, (4, 5), generator=g), torch.randint(11, (4,), generator=g)


def run(stage, world_rank=0, change=None, call="engine", updates=3):
    """Hash of the weights and buffers after some updates, with something set on the user's module after the first."""
    model = Odd()
    engine, *_ = deepspeed.initialize(model=model, config=config(stage, 1, **SGD))
    torch.manual_seed(5)
    losses = []
    for u in range(updates):
        if u == 1 and change is not None:
            change(model)
        ids, y = data(u)
        loss = F.cross_entropy((engine if call == "engine" else model)(ids), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, tree_hash(engine.train_step.params(engine.state)), tree_hash(dict(model.named_buffers()))


def evaluates(m):
    m.eval()


def one_layer_evaluates(m):
    m.layers[1].drop.eval()


def hooks(m):
    m.layers[0].register_forward_hook(lambda mod, args, out: out * 1.5)
    m.layers[2].lin.register_forward_pre_hook(lambda mod, args: (args[0] * 0.5,))
    m.register_forward_hook(lambda mod, args, out: out * 2)


def attributes(m):
    m.layers[1].gain, m.layers[0].drop.p = 3.0, 0.1


def a_forward_of_ones_own(m):
    own = m.layers[1].forward
    m.layers[1].forward = lambda x: own(x) * 2


CHANGES = [None, evaluates, one_layer_evaluates, hooks, attributes, a_forward_of_ones_own]


HOW = [(world, stage, call) for world in (1, 2) for stage in (0, 2, 3) for call in ("engine", "module")]


def changed(change, tried):
    runs = [run(stage, change=change, call=call) for _, stage, call in tried]
    return [r == runs[0] for r in runs], runs[0][0]


@EACH
@pytest.mark.parametrize("world", [1, 2])
def test_what_a_user_sets_on_the_module_counts_at_every_stage(run_world, world, whole):
    tried, losses = [row for row in (HOW if whole else cover(HOW)) if row[0] == world], {}
    for change in CHANGES:
        same, losses[change] = zoo.everywhere(run_world, world, changed, change, tried)
        assert all(same), change
    assert len({tuple(x) for x in losses.values()}) == len(CHANGES)  # each of them changed the run


def reading():
    model = Odd()
    plain = Odd()
    engine, *_ = deepspeed.initialize(model=model, config=config(3, 1, **SGD))
    ids, y = data()
    assert engine.module is model and inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(model.layers[0].forward) == inspect.signature(plain.layers[0].forward)
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(model(ids, temperature=2.0), plain(ids, temperature=2.0))
    assert torch.equal(model(ids), plain(ids)) and torch.equal(engine(ids), plain(ids))
    assert torch.equal(model.layers[1](torch.ones(2, 8)), plain.layers[1](torch.ones(2, 8)))  # a unit by itself
    assert torch.equal(model.encode(ids), plain.encode(ids))  # a method that calls submodules
    torch.testing.assert_close(engine.penalty(), plain.penalty())  # one that reads parameters
    with pytest.raises(
        RuntimeError,
        match=r"^parameter 'embed.weight' is sharded \(stage 3\) and has no values here; .* engine.method\(...\)",
    ):
        model.penalty()
    mine, theirs = model.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in theirs)
    with pytest.raises(TypeError, match="write engine.load_module_state_dict"):
        model.load_state_dict(theirs)
    for value in (
        lambda p: p.T,
        lambda p: p.data,
        lambda p: p.detach(),
        lambda p: p + 1,
        lambda p: p.sum(),
        lambda p: p[0],
        lambda p: p.tolist(),
    ):
        with pytest.raises(RuntimeError, match="is sharded"):
            value(model.embed.weight)
    p = model.layers[0].lin.weight
    assert (p.ds_shape, p.ds_numel, p.ds_status, p.device) == ((8, 8), 64, ZeroParamStatus.NOT_AVAILABLE, engine.device)
    assert (
        p.ds_id == p.ds_id != model.head.bias.ds_id
        and 0 < p.ds_tensor.numel() <= 64
        and repr(p).startswith("<sharded parameter")
    )
    number = p.ds_id
    with deepspeed.zero.GatheredParameters(p):
        assert (
            p.ds_status is ZeroParamStatus.AVAILABLE
            and p.ds_id == number
            and torch.equal(p, plain.layers[0].lin.weight)
        )
    assert p.ds_status is ZeroParamStatus.NOT_AVAILABLE and p.ds_id == number
    return True


@pytest.mark.parametrize("world", [1, 2])
def test_the_users_module_reads_as_in_plain_torch_and_is_closed_elsewhere(run_world, world):
    assert zoo.everywhere(run_world, world, reading)


def test_copies_pickles_and_what_is_left_after_destroy():
    model = Odd()
    before = {n: set(m.__dict__) for n, m in model.named_modules()}
    engine, *_ = deepspeed.initialize(model=model, config=config(3, 1, **SGD))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert [tuple(p.shape) for p in other.parameters()] == [tuple(p.shape) for p in model.parameters()]
        assert inspect.signature(other.forward) == inspect.signature(model.forward) and other.forward.__self__ is other
        with pytest.raises(RuntimeError, match="is sharded"):
            other(data()[0])
    assert torch.equal(engine.eval()(data()[0]), model(data()[0]))
    engine.destroy()
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="is sharded"):
        model(data()[0])


def test_parameters_that_were_replaced_are_told():
    model = Net()
    engine, *_ = deepspeed.initialize(model=model, config=config(3, 1, **SGD))
    x = torch.ones(2, 4)
    with pytest.raises(
        RuntimeError,
        match=(
            r"^engine: parameter 'scale' was replaced after initialize \(an assignment, or torch.func.functional_call\)"
        ),
    ):
        torch.func.functional_call(model, {"scale": torch.ones(())}, (x,))
    assert torch.equal(model(x), Net()(x))


def checkpointed(stage, on):
    model = Odd()
    for m in model.layers:
        m.norm = nn.Identity()  # a block that runs twice would count its rows twice
    engine, *_ = deepspeed.initialize(model=model, config=config(stage, 1, **SGD))
    torch.manual_seed(5)
    for u in range(3):
        for m in model.layers:
            m.gradient_checkpointing = on and u > 0
        ids, y = data(u)
        engine.backward(F.cross_entropy(engine(ids), y))
        engine.step()
    assert all(m.gradient_checkpointing is on for m in model.layers)
    return tree_hash(engine.train_step.params(engine.state))


@pytest.mark.parametrize("world", [1, 2])
def test_gradient_checkpointing_switched_on_later_changes_no_bit(run_world, world):
    assert zoo.everywhere(run_world, world, checkpointed, 3, True) == zoo.everywhere(
        run_world, world, checkpointed, 3, False
    )


def test_an_error_in_a_forward_leaves_the_module_closed_and_usable():
    model = Net()
    engine, *_ = deepspeed.initialize(model=model, config=config(3, 1, **SGD))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="is sharded"):
        model.scale + 1
    assert torch.equal(model(torch.ones(2, 4)), Net()(torch.ones(2, 4)))

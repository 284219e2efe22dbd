"""What an unmodified forward may do beside computing: hooks, caches, counters, settings, leaves of its own, compiled
blocks, mixed blocks.
"""

from __future__ import annotations

from collections import deque

import pytest
import torch
import zoo
from modules import far, got, showing
from torch import nn
from torch.utils.checkpoint import checkpoint

import funczero as fz
from funczero import P
from funczero.layout.processes import world_size

DIM = 4


class Block(nn.Module):
    def __init__(self, dim=DIM):
        super().__init__()
        self.lin = nn.Linear(dim, dim)

    def forward(self, x):
        return x + torch.tanh(self.lin(x))


class Other(Block):
    """A block of another type."""


class Net(nn.Module):
    def __init__(self, kinds=(Block, Block, Block)):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(k() for k in kinds), nn.Linear(DIM, 2)

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return self.head(x)


def build(cls, *args):
    torch.manual_seed(0)
    return cls(*args)


def loss(model, x):
    return model(x).square().sum(), torch.tensor(float(len(x)))


X = torch.linspace(-1, 1, 8 * DIM).view(8, DIM)


def calls(net, n=3, **kw):
    """The pure loss, called again and again."""
    loss_fn, params = fz.stateless(net, loss, **kw)
    return [loss_fn(params, X)[0].item() for _ in range(n)]


# --- hooks ------------------------------------------------------------------------------------------------------------
class Hooking(Net):
    """Registers a hook at every forward on the head, and once on the first block, as a model that captures outputs
    does.
    """

    def __init__(self):
        super().__init__()
        self.hooked = False

    def forward(self, x):
        if not self.hooked:
            self.blocks[0].register_forward_hook(lambda m, args, out: out * 2)
            self.hooked = True
        handle = self.head.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        out = super().forward(x)
        handle.remove()
        return out


@pytest.mark.parametrize("kw", [{}, {"units": ()}, {"remat": True}], ids=str)
def test_hooks_that_a_forward_registers_do_not_stay(kw):
    net = build(Hooking)
    assert len(set(calls(net, **kw))) == 1 and calls(net, 1, **kw)[0] == pytest.approx(loss(net, X)[0].item())


def test_hooks_that_the_module_has_count():
    net = build(Net)
    net.blocks[1].register_forward_hook(lambda m, args, out: out * 3)
    assert calls(net, 1) == [loss(net, X)[0].item()]


def hooked_gradients():
    """A block that hooks itself in its first run, run again in the backward: the same function twice."""
    out = []
    for remat in (False, True):
        loss_fn, params = fz.stateless(build(Hooking), loss, remat=remat)
        step = fz.train_step(
            *fz.zero(fz.value_and_grad(loss_fn, batch=P("data")), fz.sgd(0.1), stage=3), mesh={"data": -1}
        )
        state, m = step(step.init(params), step.local_rows(X))
        out.append(zoo.tree_hash([step.params(state), m.grad_norm]))
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_a_hook_of_the_first_run_is_there_in_the_second(run_world, world):
    keep, remat = zoo.everywhere(run_world, world, hooked_gradients)
    assert keep == remat


# --- state beside the state_dict --------------------------------------------------------------------------------------
class Stateful(Net):
    """Keeps something of the kind that is asked for."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.seen, self.width, self.history, self.average = kind, 0, 9, [], torch.zeros(())
        self.cache, self.recent, self.made = None, deque(), False

    def forward(self, x):
        if self.kind == "counter":
            self.seen += 1
        elif self.kind == "setting":
            self.width = min(self.width, x.shape[1])
        elif self.kind == "list":
            self.history.append(1)
        elif self.kind == "tensor":
            self.average = self.average * 0.5 + x.mean()
        elif self.kind == "deque":
            self.recent.append(1)
        elif self.kind == "cache":
            self.cache, self.made, self.fresh = x.shape, True, 3
        return super().forward(x) * self.width


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            "counter",
            (
                "the forward changes 'seen' \\(from 1 to 2\\), but a pure loss has nowhere to keep it; hand it in with"
                " the batch, or return it as aux"
            ),
        ),
        ("tensor", "changes tensor 'average', but a pure loss has nowhere to keep it"),
        ("deque", "changes 'recent' \\(a deque of 0 values, now 1, which all calls share\\)"),
    ],
)
def test_state_that_would_be_forgotten_is_refused_by_name(kind, says):
    with pytest.raises(RuntimeError, match=says):
        calls(build(Stateful, kind), 1)


@pytest.mark.parametrize(("kind", "names"), [("cache", {"cache", "made", "fresh"}), ("list", {"history"})])
def test_caches_are_said_once(kind, names, caplog):
    assert len(set(calls(build(Stateful, kind)))) == 1
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == len(names) and all(any(f"'{n}'" in text for text in said) for n in names)


def test_a_setting_is_kept_and_said(caplog):
    net = build(Stateful, "setting")
    plain = build(Stateful, "setting")
    assert set(calls(net)) == {loss(plain, X)[0].item()} and net.width == 9
    assert [r.getMessage() for r in caplog.records] == [
        "stateless: the forward sets 'width' from 9 to 4, which is kept; should it move again, it is refused"
    ]


# --- leaves, closures, compiled modules -------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", range(4))
def test_a_leaf_that_the_forward_makes_is_its_own(stage):
    def penalty(model, x):
        x = x.clone().requires_grad_()
        out = model(x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.square().sum() + g.square().sum(), torch.tensor(float(len(x)))

    net = build(Net)
    want = torch.autograd.grad(penalty(net, X)[0] / len(X), list(net.parameters()))
    loss_fn, params = fz.stateless(net, penalty)
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(loss_fn, batch=P("data")), fz.sgd(1.0), stage=stage), mesh={"data": 1}
    )
    new = step.params(step(step.init(params), X)[0])
    for g, (name, p) in zip(want, params.items(), strict=True):
        torch.testing.assert_close(p - new[name], g, rtol=1e-4, atol=1e-5)


def test_what_a_loss_captures_is_refused():
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(
        TypeError,
        match=(
            "the loss captures a tensor of shape \\(\\) that needs a gradient, which nobody would hear of; register it"
        ),
    ):
        fz.stateless(build(Net), lambda model, x: (model(x).sum() * scale, torch.ones(())))


@pytest.mark.parametrize("how", ["whole", "in place", "blocks"])
def test_compiled_modules_run_uncompiled_in_print(how, caplog):
    net = build(Net)
    want = loss(net, X)[0].item()
    if how == "whole":
        net = torch.compile(net, backend="eager")
    elif how == "in place":
        net.compile(backend="eager")
    else:
        for i in range(3):
            net.blocks[i] = torch.compile(net.blocks[i], backend="eager")
    loss_fn, params = fz.stateless(net, loss)
    zero = {n: torch.zeros_like(p) for n, p in params.items()}
    assert loss_fn(params, X)[0].item() == want and loss_fn(zero, X)[0].item() == 0
    assert any("torch.compile is taken off" in r.getMessage() for r in caplog.records)


# --- draws within what runs again -------------------------------------------------------------------------------------


# --- units ------------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Two lists of blocks; the second of them runs first."""

    def __init__(self):
        super().__init__()
        self.text, self.vision = nn.ModuleList(Block() for _ in range(4)), nn.ModuleList(Other() for _ in range(4))

    def forward(self, x):
        y = x
        for b in self.vision:
            y = b(y)
        for b in self.text:
            x = b(x)
        return x + y


def peaks():
    """Units gathered at once, by update."""
    loss_fn, params = fz.stateless(build(Towers), loss)
    tapes, out = [], []
    grad = fz.value_and_grad(showing(loss_fn, tapes.append), batch=P("data"))
    step = fz.train_step(fz.shard("data", grad, fz.sgd(0.1)), mesh={"data": world_size()})
    state = step.init(params)
    for _ in range(3):
        state, _ = step(state, step.local_rows(X))
        out.append(tapes.pop().gathers.peak)
    return out


def test_two_units_are_open_whichever_list_runs_first(run_world):
    assert max(zoo.everywhere(run_world, 2, peaks)) <= 2


class Rechecking(Block):
    """Checkpoints a part of itself."""

    def forward(self, x):
        return x + checkpoint(lambda y: torch.tanh(self.lin(y)), x, use_reentrant=False)


def rechecked(remat):
    out = []
    for stage in range(4):
        net = build(Net, (Rechecking,) * 3)
        loss_fn, params = fz.stateless(net, loss, remat=remat)
        out.append(far(net, loss, X, got(loss_fn, params, X, stage)))
    return out


@pytest.mark.parametrize("remat", [False, True], ids=["keep", "remat"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_inside_a_unit_reads_the_unit_again(run_world, world, remat):
    assert max(zoo.everywhere(run_world, world, rechecked, remat)) < 1e-5

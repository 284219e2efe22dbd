"""Modules for tests of `stateless`, their losses, and how far a step's values are from the plain module's."""

from __future__ import annotations

import weakref
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import funczero as fz
from funczero import P
from funczero.gradients.ref import Ref
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


def showing(loss_fn, see):
    """A loss of `stateless` that first shows the tape which it is called on: `see(tape)`."""

    @wraps(loss_fn)
    def shown(params, *rest):
        see(next(x.tape for x in params.values() if isinstance(x, Ref)))
        return loss_fn(params, *rest)

    return shown


class Alive(TorchDispatchMode):
    """While it is entered: the memory of tensors of one shape that torch's operators make, and is alive at once."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.live, self.most = shape, weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == self.shape:
            self.live.add(out.untyped_storage())
            self.most = max(self.most, len(self.live))
        return out


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


def look(module):
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

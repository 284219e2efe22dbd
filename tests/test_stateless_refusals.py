"""Modules that cannot be pure are refused in one sentence, and those that can are not."""

from __future__ import annotations

import pytest
import torch
from modules import DIM, Net, batch, got, loss
from torch import nn

from funczero.gradients.stateless import stateless


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
        (lambda: Norm(), {}, TypeError, "the forward changes buffers .*call loss_fn\\(params, model_state, batch"),
        (lambda: Cached(True), {}, RuntimeError, "changes buffer 'table'"),
        (lambda: nn.BatchNorm1d(2, device="meta"), {}, ValueError, "buffer 'running_mean' is on the meta device"),
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

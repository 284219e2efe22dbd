"""A tree of modules as it was: what is copied for every call, what is left alone, and what a forward may not leave."""

from __future__ import annotations

import weakref

import pytest
import torch
from modules import Net, batch, build, look, loss
from torch import nn

from funczero.gradients.stateless import stateless


# --- the module is not touched ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("remat", [False, True])
def test_the_module_is_untouched(remat):
    net = build(Net, p=0.2)
    net.register_buffer("ones", torch.ones(3))
    before = look(net)
    loss_fn, params = stateless(net, loss, remat=remat)
    live = {n: p.clone().requires_grad_() for n, p in params.items()}
    loss_fn(live, batch(), 3)[0].backward()
    assert look(net) == before and all(p.grad is None for p in net.parameters())
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

"""What `stateless` leaves alone: the module, who holds it, the global generator; and which lists are units."""

from __future__ import annotations

import weakref

import pytest
import torch
from modules import Block, Net, batch, build, look, loss
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

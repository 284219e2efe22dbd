"""Modules as pure losses: the values of the plain module at every stage and world, and two units of memory."""

from __future__ import annotations

import gc
import weakref
from itertools import product

import pytest
import torch
from cover import EACH, cover
from modules import DIM, MICROS, VOCAB, Alive, Block, Net, batch, build, far, got, loss, showing
from torch import nn

import funczero as fz
from funczero import P
from funczero.gradients.stateless import stateless
from funczero.layout.where import Where
from funczero.testing import tree_hash

# --- values -----------------------------------------------------------------------------------------------------------
PLACES = [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 3)]  # worlds and stages
FORMS = list(product(PLACES, (False, True)))


def _gradients(forms):
    out = {}
    for (_, stage), remat in forms:
        net = build(Net, torch.float64)
        loss_fn, params = stateless(net, loss, remat=remat)
        out[remat, stage] = far(
            net, loss, batch(dtype=torch.float64), got(loss_fn, params, batch(dtype=torch.float64), stage)
        )
    return out


@EACH
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_are_the_modules_own(run_world, world, whole):
    some = [form for form in (FORMS if whole else cover(FORMS, by=1)) if form[0][0] == world]
    for result in run_world(world, _gradients, some):
        assert max(result.values()) < 1e-12, result


def _hashes(world, p, functional, forms):
    out = {}
    for (_, stage), remat in forms:
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


DRAWS = {"plain": (0.0, False), "dropout": (0.3, False), "functional dropout": (0.3, True)}
DRAWN = [(draw, *form) for draw, form in product(DRAWS, FORMS)]


@EACH
@pytest.mark.parametrize("draw", DRAWS)
def test_the_same_bits_at_every_stage_and_world_in_both_forms(run_world, draw, whole):
    """Without `whole` every kind in both forms, and every form at every stage and world."""
    found, some = {}, DRAWN if whole else cover(DRAWN, pairs=[(0, 2), (1, 2)])
    for world in (1, 2, 4):
        forms = [form for one, *form in some if one == draw and form[0][0] == world]
        for result in run_world(world, _hashes, world, *DRAWS[draw], forms) if forms else ():
            assert all(found.setdefault(k, v) == v for k, v in result.items())
    assert len(set(found.values())) == 1 < len(found), found


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


# --- blocks that ask to run again -------------------------------------------------------------------------------------
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


# --- memory -----------------------------------------------------------------------------------------------------------
def _peaks():
    """By form: units gathered at once, as the tape counts them and as memory has them; and whether all of it goes."""
    out, tapes = {}, []
    for remat in (False, True):
        loss_fn, params = stateless(build(Plain), loss, remat=remat)
        step = fz.train_step(
            *fz.zero(fz.value_and_grad(showing(loss_fn, tapes.append), batch=P("data")), fz.sgd(1.0), stage=3),
            mesh={"data": -1},
        )
        state = step.init(params)
        whole = Where.whole(state.params.where.structure)
        (length,) = {n for n, unit in zip(whole.lengths, whole.structure.units, strict=True) if unit.seam}
        gc.disable()
        with Alive((length,)) as blocks:  # of nothing else
            state, _ = step(state, step.local_rows(batch()))
        tape = tapes.pop()
        booked, tape = tape.gathers.peak, weakref.ref(tape)
        gone = tape() is None and not len(blocks.live)
        gc.enable()
        out[remat] = booked, blocks.most, gone
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
            assert 0 < booked <= 2 and 0 < real <= 2 and gone, result

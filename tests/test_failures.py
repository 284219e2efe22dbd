"""A call that fails has happened or it has not: who catches its error and goes on gets the numbers that he would have
without it, or is told.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F
from engines import ADAM, Net, a, b, config, make
from torch.utils._python_dispatch import TorchDispatchMode

import funczero as fz
import funczero.deepspeed as deepspeed
from funczero.checkpoint import Checkpointer, CheckpointError, checkpointer


class Fuse(torch.autograd.Function):
    """The identity, whose backward fails once for every entry of a box."""

    @staticmethod
    def forward(ctx, x, box):
        ctx.box = box
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.box:
            raise torch.OutOfMemoryError(ctx.box.pop())
        return g, None


class Fused(Net):
    """Blocks with a fuse before each."""

    def __init__(self):
        super().__init__()
        self.fuses = [[] for _ in self.blocks]

    def forward(self, x):
        x = self.first(x)
        for block, box in zip(self.blocks, self.fuses, strict=True):
            x = block(Fuse.apply(x, box))
        return self.last(x) * self.scale


def loss_of(engine, batch):
    return F.cross_entropy(engine(batch[0]), batch[1])


def weights(engine):
    return [x.clone() for x in engine.module_state_dict().values()]


def same(xs, ys):
    return all(map(torch.equal, xs, ys))


class Interrupt(TorchDispatchMode):
    """Ctrl-C at the n-th operation of torch that runs inside."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


# --- an engine's backward ---------------------------------------------------------------------------------------------
def backwards_that_fail(stage):
    """By the block whose backward fails: are the weights those of a loop that never saw that micro-batch?"""

    def trained(fails):
        model = Fused()
        engine = deepspeed.initialize(model=model, config=config(stage, k=2, **ADAM))[0]
        for i, batch in enumerate((a, b, b, a)):
            if i == 1 and fails is not None:
                model.fuses[fails].append("no memory")
                with pytest.raises(torch.OutOfMemoryError):
                    engine.backward(loss_of(engine, a))
            engine.backward(loss_of(engine, batch))
            engine.step()
        return weights(engine)

    want = trained(None)
    return [same(want, trained(block)) for block in range(3)]


@pytest.mark.parametrize("stage", [0, 3])
def test_the_gradients_of_a_backward_that_failed_are_in_no_update(run_world, stage):
    assert run_world(2, backwards_that_fail, stage) == [[True] * 3] * 2


@pytest.mark.parametrize("stage", [0, 3])
def test_leaves_of_no_engine_hear_nothing_of_a_backward_that_failed(stage, monkeypatch):
    engine, own = make(stage, **ADAM), torch.ones(3, requires_grad=True)

    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr("funczero.transforms.accumulate._taken", fails)
        with pytest.raises(torch.OutOfMemoryError):
            engine.backward(F.cross_entropy(engine(a[0]) * own, a[1]))
    assert own.grad is None and engine.window_length() == 0
    engine.backward(F.cross_entropy(engine(a[0]) * own, a[1]))
    assert own.grad is not None and engine.window_length() == 1


# --- an engine's step -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_fails_before_it_writes_is_made_again(stage):
    want, engine = make(stage, **ADAM), make(stage, **ADAM)
    for e in (want, engine):
        e.backward(loss_of(e, a))
    engine.optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        engine.step()
    assert engine.global_steps == engine.micro_steps == 0 and not engine.was_step_applied()
    why = r"^engine.backward: the last engine.step\(\) failed before it wrote anything, .*; call engine.step\(\) again"
    with pytest.raises(RuntimeError, match=why):
        engine.backward(loss_of(engine, b))
    engine.optimizer.param_groups[0]["lr"] = 1e-2
    for e in (want, engine):
        e.step()
        e.backward(loss_of(e, b))
        e.step()
    assert engine.micro_steps == 2 and same(weights(want), weights(engine))


def test_the_window_of_a_step_that_failed_can_be_forgotten(tmp_path):
    want, engine = make(2, k=2, **ADAM), make(2, k=2, **ADAM)
    for _ in range(2):
        engine.backward(loss_of(engine, a))
        if engine.is_gradient_accumulation_boundary():
            engine.optimizer.param_groups[0]["weight_decay"] = -1.0
            with pytest.raises(ValueError, match="weight_decay"):
                engine.step()
        else:
            engine.step()
    engine.save_checkpoint(tmp_path, "waits")
    engine.load_checkpoint(tmp_path, "waits")
    with pytest.raises(RuntimeError, match=r"or engine.forget\(\) .* to go on without those micro-batches$"):
        engine.backward(loss_of(engine, b))
    engine.forget()
    engine.optimizer.param_groups[0]["weight_decay"] = 0.1
    for e in (want, engine):
        for batch in (b, a):
            e.backward(loss_of(e, batch))
            e.step()
    assert same(weights(want), weights(engine))


REFUSED = {
    "a forward": lambda e: e(a[0]),
    "the state": lambda e: e.state,
    "a step": lambda e: e.step(),
    "whole weights": lambda e: e.module_state_dict(),
    "a parameter": lambda e: deepspeed.utils.safe_get_full_fp32_param(next(e.parameters())),
    "its masters": lambda e: next(e.masters()),
    "a checkpoint of it": lambda e: e.save_checkpoint("/nowhere", "left"),
}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_engine_that_failed_amid_its_writing_says_so_until_a_checkpoint_is_loaded(stage, tmp_path, monkeypatch):
    want, engine = make(stage, **ADAM), make(stage, **ADAM)
    engine.save_checkpoint(tmp_path, "good")
    for e in (want, engine):
        e.backward(loss_of(e, a))
    with monkeypatch.context() as patched:
        broken = torch.OutOfMemoryError("no memory")
        patched.setattr("funczero.transforms.update.Updated", lambda *args: (_ for _ in ()).throw(broken))
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert engine.global_steps == 0 and engine.skipped_steps == 0
    for what, call in REFUSED.items():
        with pytest.raises(RuntimeError, match="engine.step has failed when it had begun to write"):
            call(engine)
            pytest.fail(what)
    for only in ({"load_optimizer_states": False}, {"load_module_only": True}):
        with pytest.raises(CheckpointError, match="would stay as the given state has them, but that one was donated"):
            engine.load_checkpoint(tmp_path, "good", **only)
    engine.load_checkpoint(tmp_path, "good")
    engine.backward(loss_of(engine, a))
    for e in (want, engine):
        e.step()
    assert same(weights(want), weights(engine))


def test_parameters_of_another_shape_are_refused_before_one_is_written():
    engine = make(3, **ADAM)
    before, other = weights(engine), {n: x + 1 for n, x in engine.module_state_dict().items()}
    other["last.weight"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"^parameter 'last.weight' has shape \(3, 6\), but the value has \(2, 2\)"):
        engine.load_module_state_dict(other)
    assert same(before, weights(engine))


class Stops(torch.optim.lr_scheduler.LambdaLR):
    """A client's scheduler that is interrupted, or fails by itself."""

    raises = None

    def step(self, *args):
        if self.raises is not None:
            raise self.raises
        super().step(*args)


@pytest.mark.parametrize("raises", [ValueError("the end of the schedule"), KeyboardInterrupt()], ids=["own", "ctrl-c"])
def test_a_clients_scheduler_that_fails_leaves_an_update_that_is_made(raises):
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = Stops(optimizer, lambda n: 1 / (1 + n))
    more = {k: x for k, x in config().items() if k != "optimizer"}
    engine = deepspeed.initialize(model=model, config=more, optimizer=optimizer, lr_scheduler=scheduler)[0]
    engine.backward(loss_of(engine, a))
    scheduler.raises = raises
    with pytest.raises(type(raises)):
        engine.step()
    assert engine.global_steps == 1 and engine.was_step_applied()
    if isinstance(raises, KeyboardInterrupt):  # nobody knows how far it came
        with pytest.raises(RuntimeError, match="has failed when it had begun to write"):
            engine.state  # noqa: B018
    else:
        engine.backward(loss_of(engine, b))


def interrupted(stage, at):
    """Weights after two updates, of which the second is interrupted at an operation and then made again, None where the
    engine says that it cannot go on; and was there such an operation?
    """
    engine = make(stage, **ADAM)
    reached = False
    for batch in (a, b):
        engine.backward(loss_of(engine, batch))
        with Interrupt(at if batch is b else -1) as mode, contextlib.suppress(KeyboardInterrupt):
            engine.step()
        reached = 0 < at <= mode.count
    if not reached:
        return weights(engine), False
    try:
        engine.step()
    except RuntimeError as error:
        if "has failed when it had begun to write" in str(error):
            return None, True
        assert "was not called since the last engine.step" in str(error)  # it was made
    return weights(engine), True


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_wherever_a_step_is_interrupted_it_has_happened_or_not(stage):
    (want, _), seen = interrupted(stage, -1), set()
    for at in range(1, 10_000):
        got, reached = interrupted(stage, at)
        if not reached:
            break
        seen.add(got is None)
        assert got is None or same(want, got), at
    assert at > 30 and seen == {True, False}


# --- a donated state of a stream --------------------------------------------------------------------------------------
def plain(params, batch):
    return (torch.tanh(batch @ params["w"]) ** 2).sum(), torch.tensor(float(len(batch)))


@pytest.mark.parametrize("sums", ["tree", "exact"])
def test_the_window_of_a_donated_stream_is_as_it_was_where_its_update_failed_before_writing(sums):
    box = []

    def fails(g):
        if box:
            raise torch.OutOfMemoryError(box.pop())
        return g

    grad = fz.value_and_grad(plain, batch=fz.P("data"))
    mine = fz.map_leaves(fails, "w", elementwise=True)
    step = fz.donate(
        fz.train_step(
            grad, fz.shard("data", fz.accumulate(2, stream=True), mine, fz.adamw(0.1)), mesh={"data": 1}, sums=sums
        )
    )

    def trained(fail):
        state = step.init({"w": torch.eye(4)})
        for i in range(4):
            state, _ = step(state, torch.full((2, 4), 0.1 * (i + 1)))
            if i % 2:
                if fail:
                    box.append("no memory")
                    with pytest.raises(torch.OutOfMemoryError):
                        step(state, None)
                state, _ = step(state, None)
        return step.params(state)["w"]

    assert torch.equal(trained(False), trained(True))


# --- restores into memory that is given -------------------------------------------------------------------------------
def test_a_state_that_a_failed_restore_has_written_into_is_used_up(tmp_path, monkeypatch):
    step = fz.train_step(fz.value_and_grad(plain), fz.adamw(0.1))
    state = step(step.init({"w": torch.eye(4)}), torch.ones(2, 4))[0]
    with Checkpointer(tmp_path) as ck:
        ck.save(state, 1)
        ck.wait()
        given = step.init({"w": torch.zeros(4, 4)})
        with monkeypatch.context() as patched:
            patched.setattr("funczero.checkpoint.reading.load_client", lambda *args: 1 / 0)
            with pytest.raises(CheckpointError):
                ck.restore(1, like=given, donate=True)
        with pytest.raises(RuntimeError, match="was donated at step 1"):
            step(given, torch.ones(2, 4))
        with pytest.raises(CheckpointError, match="would stay as the given state has them"):
            ck.restore(1, like=given, only="^params/", donate=True)
        found = ck.restore(1, like=given, donate=True).state
        assert found.step is given.step and torch.equal(step.params(found)["w"], step.params(state)["w"])
        kept = ck.restore(1, like=step.init({"w": torch.zeros(4, 4)}), only="^params/", donate=True).state
        assert int(kept.step) == 0 and torch.equal(step.params(kept)["w"], step.params(state)["w"])
    for look in (step.views, step.whole_views, step.tape):
        used = fz.tree.map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)
        fz.donate(step)(used, torch.ones(2, 4))
        with pytest.raises(RuntimeError, match="this state was donated at step 1"):
            look(used)


def test_a_save_that_an_interrupt_has_cut_off_writes_what_it_was_given(tmp_path, monkeypatch):
    step = fz.train_step(fz.value_and_grad(plain), fz.sgd(0.1))
    first, second = (step.init({"w": torch.full((4, 4), x)}) for x in (1.0, 2.0))
    goes_on, threads, save = threading.Event(), [], checkpointer.Save
    with Checkpointer(tmp_path, step=step, passing=lambda point: point != "begun" or goes_on.wait()) as ck:

        def cut_off(*args):
            threads.append(save(*args))
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(checkpointer, "Save", cut_off)
            with pytest.raises(KeyboardInterrupt):
                ck.save(first, 1)
        ck.save(second, 2)
        goes_on.set()
        threads[0].result()
        with contextlib.suppress(CheckpointError):  # both are saved at once
            ck.wait()
        got = ck.restore(1, like=(step, {"w": torch.empty(4, 4)})).state
        assert torch.equal(step.params(got)["w"], step.params(first)["w"])


# --- a loop's optimizer -----------------------------------------------------------------------------------------------
def test_moments_of_another_shape_are_refused_before_one_is_written():
    pytest.importorskip("lightning")
    from funczero.lightning.moments import optimizer_state, restore_optimizer

    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    more = {k: x for k, x in config(3).items() if k != "optimizer"}
    engine = deepspeed.initialize(model=model, config=more, optimizer=optimizer)[0]
    engine.backward(loss_of(engine, a))
    engine.step()
    before, saved = optimizer_state(engine), optimizer_state(engine)
    saved["state"] = {i: {k: x + 1 for k, x in own.items()} for i, own in saved["state"].items()}
    saved["state"][max(saved["state"])]["exp_avg"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="but the value has"):
        restore_optimizer(engine, saved)
    after = optimizer_state(engine)
    assert all(same(own.values(), after["state"][i].values()) for i, own in before["state"].items())

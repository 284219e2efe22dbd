"""What an engine cannot do rightly it refuses in one sentence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engines import Net, a, config, make
from torch import nn

import funczero.deepspeed as deepspeed


@pytest.mark.parametrize("stage", range(4))
def test_misuse_gets_one_sentence(stage):
    engine = make(stage)
    old, older = F.cross_entropy(engine(a[0]), a[1]), F.cross_entropy(engine(a[0]), a[1])
    with pytest.raises(
        RuntimeError,
        match=(
            r"^engine.step: engine.backward\(loss\) was not called since the last engine.step\(\); call it for every"
            r" micro-batch, before step$"
        ),
    ):
        engine.step()
    F.cross_entropy(engine(a[0]), a[1]).backward()
    with pytest.raises(
        RuntimeError,
        match=(
            r"^engine.step: parameter '.*' has a .grad, so loss.backward\(\) was called directly .*; write"
            r" engine.backward\(loss\) instead$"
        ),
    ):
        engine.step()
    with pytest.raises(RuntimeError, match="^optimizer.step: parameter"):
        engine.optimizer.step()
    for p in engine.parameters():
        p.grad = None
    engine.backward(F.cross_entropy(engine(a[0]), a[1]))
    with pytest.raises(RuntimeError, match='^clip_grad_norm_: .*; write "gradient_clipping" in the config'):
        nn.utils.clip_grad_norm_(engine.parameters(), 1.0)
    engine.step()
    for x in older, F.cross_entropy(engine(a[0]), a[1]) + old:
        with pytest.raises(
            RuntimeError,
            match=(
                "^backward: this loss comes from a forward before the last update, and the parameters have moved since;"
                " run engine.batch. again"
            ),
        ):
            engine.backward(x)
    with pytest.raises(
        RuntimeError,
        match=(
            "^engine.backward: this loss depends on no parameter of this engine that is trained; compute it from what"
            " engine.batch. returns"
        ),
    ):
        engine.backward(torch.ones((), requires_grad=True) * 2)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="this loss needs no gradient; was the forward under torch.no_grad"),
    ):
        engine.backward(engine(a[0]).sum())
    with pytest.raises(
        TypeError,
        match=(
            r"^engine.backward: the loss is a tensor of shape \(4, 3\) and torch.float32; give one floating 0-d tensor"
        ),
    ):
        engine.backward(engine(a[0]))
    assert engine.optimizer.zero_grad() is None and engine.zero_grad() is None and engine.optimizer.step() is None
    if stage > 1:
        with (
            pytest.raises(
                RuntimeError, match=f"^engine.no_sync: at stage {stage} gradients are sharded as they are born"
            ),
            engine.no_sync(),
        ):
            pass
    else:
        with engine.no_sync():
            engine.backward(F.cross_entropy(engine(a[0]), a[1]))
        engine.step()


def test_a_graph_used_twice_an_unknown_attribute_and_a_write_behind_the_engine():
    engine = make()
    loss = F.cross_entropy(engine(a[0]), a[1])
    engine.backward(loss)
    with pytest.raises(
        RuntimeError, match="this graph was used up by a backward before; write engine.backward.loss, retain_graph=True"
    ):
        engine.backward(loss)
    with pytest.raises(AttributeError, match="^engine.get_learning_rate: it does not exist here; "):
        engine.get_learning_rate()
    with pytest.raises(
        AttributeError, match="^engine.offload_states: it does not exist here; offload does not exist here yet"
    ):
        engine.offload_states()
    assert engine.first is engine.module.first
    with torch.no_grad():
        engine.module.first.weight.clamp_(-0.01, 0.01)
    with pytest.raises(
        RuntimeError,
        match="^engine.step: parameter 'first.weight' was written to since the last update, .*zero.GatheredParameters",
    ):
        engine.step()


def test_what_initialize_cannot_honour_is_refused_by_name():
    for kwargs, said in (
        (dict(model=None), "it needs a model"),
        (dict(mpu=object()), "mpu= asks for model parallelism"),
        (dict(config=None), "no config; write config="),
        (dict(config_params={}), "config= and config_params= both name a config"),
        (dict(model_parameters=[nn.Parameter(torch.ones(2))]), "of shape \\(2,\\), is not one of the model's"),
        (dict(model=make()), "this model is an engine already"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            deepspeed.initialize(**{"model": Net(), "config": config(), **kwargs})
    net = Net()
    engine = make(model=net)
    with pytest.raises(RuntimeError, match="belongs to another engine already"):
        make(model=net)
    assert engine.global_steps == 0


@pytest.mark.parametrize("stage", (0, 1, 3))
def test_an_initialize_that_is_refused_takes_nothing(stage):
    net, other = Net(), torch.optim.SGD(Net().parameters(), lr=0.1)
    before = {n: x.clone() for n, x in net.state_dict().items()}
    refused = []  # an error keeps its frames, and so the engine that was built, alive
    for scheduler in (torch.optim.lr_scheduler.StepLR(other, 1), lambda optimizer: object(), lambda optimizer: 1 / 0):
        with pytest.raises((ValueError, TypeError, ZeroDivisionError)) as error:
            deepspeed.initialize(model=net, lr_scheduler=scheduler, config=config(stage))
        refused.append(error.value)
        assert {type(p) for p in net.parameters()} == {nn.Parameter}
        assert all(torch.equal(x, before[n]) for n, x in net.state_dict().items())
    loss = F.cross_entropy(net(a[0]), a[1])
    engine = make(stage, model=net)
    torch.testing.assert_close(F.cross_entropy(engine(a[0]), a[1]), loss)
    assert len(refused) == 3

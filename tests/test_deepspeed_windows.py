"""Whatever calls of backward and step make a window, its gradient is DeepSpeed's: the sum of its losses over
gradient_accumulation_steps.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from cover import EACH
from engines import Net, config
from torch import nn

import funczero.deepspeed as deepspeed
from funczero.deepspeed import comm

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOSSES = 6


# A pattern is a list of calls: ("b", i, averaged) is a backward of micro-batch i, "s" a step, True and False are
# boundary flags.
def both(i):
    return [("b", i, True), "s"]


def patterns(k):
    """name -> (calls, weights): what a loop does in one window, and the weight that DeepSpeed gives to every loss."""
    b, every = ("b", 0, True), range(k)
    found = {
        "backward and step": (sum((both(i) for i in every), []), {i: 1 / k for i in every}),
        "flags by hand, a step each": (sum(([i == k - 1, *both(i)] for i in every), []), {i: 1 / k for i in every}),
        "Accelerate: flags, k backwards, one step": (
            sum(([i == k - 1, ("b", i, True)] for i in every), []) + ["s"],
            {i: 1 / k for i in every},
        ),
        "k backwards, a flag, one step": ([("b", i, True) for i in every] + [True, "s"], {i: 1 / k for i in every}),
        "short by flag": (
            [False, *both(0), True, *both(1)] if k > 2 else [True, *both(0)],
            {0: 1 / k, 1: 1 / k} if k > 2 else {0: 1 / k},
        ),
        "long by flag": (
            [False] + sum((both(i) for i in range(k)), []) + [True, *both(k)],
            {i: 1 / k for i in range(k + 1)},
        ),
        "several losses a micro-batch": (
            sum(([("b", i, True), ("b", i + 1, True), "s"] for i in every), []),
            {i: ((i > 0) + (i < k)) / k for i in range(k + 1)},
        ),
        "Hugging Face: not averaged": (
            sum(([i == k - 1, ("b", i, False), "s"] for i in every), []),
            {i: 1.0 for i in every},
        ),
        "not averaged, one step": ([False] + [("b", i, False) for i in every] + [True, "s"], {i: 1.0 for i in every}),
        "both kinds": (sum(([b, ("b", 1, False), "s"] for _ in every), []), {0: 1.0, 1: float(k)}),
    }
    return found


def batches(rank):
    g = torch.Generator().manual_seed(11 + rank)
    return [(torch.randn(4, 4, generator=g), torch.randint(3, (4,), generator=g)) for _ in range(LOSSES)]


def windows(stage, k, precision):
    """By pattern: largest gap between what the second of two windows took away, with lr 1, and plain torch's gradient
    at the same weights.
    """
    gaps, dtype = {}, DTYPES[precision]
    for name, (calls, weights) in patterns(k).items():
        engine, *_ = deepspeed.initialize(
            model=Net(),
            config=config(stage, k, precision, optimizer={"type": "SGD", "params": {"lr": 1.0}}, gradient_clipping=0),
        )
        mine = batches(comm.get_rank())
        for _ in range(2):
            before = engine.train_step.params(engine.state)
            before = {n: x.clone() for n, x in before.items()}
            for call in calls:
                if call == "s":
                    engine.step()
                elif isinstance(call, bool):
                    engine.set_gradient_accumulation_boundary(call)
                else:
                    loss = F.cross_entropy(engine(mine[call[1]][0].to(dtype)).float(), mine[call[1]][1])
                    said = engine.backward(loss, scale_wrt_gas=call[2])
                    assert said.item() == pytest.approx(loss.item() / (k if call[2] else 1))
        assert engine.global_steps == 2 and engine.skipped_steps == 0, name
        after, net = engine.train_step.params(engine.state), Net().to(dtype)
        net.load_state_dict({n: x.to(dtype) for n, x in before.items()})
        total = [torch.zeros(p.shape) for p in net.parameters()]
        size = comm.get_world_size()
        for rank in range(size):
            for i, weight in weights.items():
                x, y = batches(rank)[i]
                grads = torch.autograd.grad(
                    F.cross_entropy(net(x.to(dtype)).float(), y), [p for p in net.parameters() if p.requires_grad]
                )
                for t, g in zip(
                    (t for t, p in zip(total, net.parameters(), strict=True) if p.requires_grad), grads, strict=True
                ):
                    t += weight / size * g.float()
        gaps[name] = max(
            (before[n] - after[n] - t).abs().max().item()
            for (n, _), t in zip(net.named_parameters(), total, strict=True)
        )
        engine.destroy()
    return gaps


CASES = [(1, "fp32"), (4, "fp32"), (4, "fp16"), (4, "bf16"), (3, "fp32")]
FEW = {0: CASES[:1], 1: CASES[3:4], 2: CASES[4:], 3: CASES[1:3]}  # by stage: every case somewhere
BOUND = {"fp32": 2e-6, "fp16": 6e-3, "bf16": 4e-2}  # 16 bits: the cotangent is rounded at another scale


@EACH
@pytest.mark.parametrize(
    ("stage", "world"),
    [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 2),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0, 2), (1, 2), (2, 1), (3, 1))),
    ],
)
def test_every_pattern_of_backward_and_step_gives_deepspeeds_numbers(run_world, world, stage, whole):
    for k, precision in CASES if whole else FEW[stage]:
        gaps = zoo.everywhere(run_world, world, windows, stage, k, precision)
        assert max(gaps.values()) < BOUND[precision], (k, precision, gaps)


def bits(stage, k):
    """Hashes of the weights after Accelerate's loop and after a step a micro-batch."""
    from funczero.testing import tree_hash

    found = []
    for name in ("backward and step", "flags by hand, a step each", "Accelerate: flags, k backwards, one step"):
        engine, *_ = deepspeed.initialize(model=Net(), config=config(stage, k))
        for call in patterns(k)[name][0]:
            if call == "s":
                engine.step()
            elif isinstance(call, bool):
                engine.set_gradient_accumulation_boundary(call)
            else:
                x, y = batches(comm.get_rank())[call[1]]
                engine.backward(F.cross_entropy(engine(x), y))
        found.append(tree_hash(engine.train_step.params(engine.state)))
    return found


@pytest.mark.parametrize("stage", range(4))
def test_accelerates_loop_has_the_bits_of_deepspeeds(run_world, stage):
    assert len(set(zoo.everywhere(run_world, 2, bits, stage, 4))) == 1


@pytest.mark.parametrize("stage", [0, 1])
def test_no_sync_adds_up_and_is_left_before_a_step(stage):
    engine, *_ = deepspeed.initialize(
        model=Net(), config=config(stage, 2, optimizer={"type": "SGD", "params": {"lr": 1.0}})
    )
    (x, y), (x2, y2) = batches(0)[:2]
    with engine.no_sync():
        engine.backward(F.cross_entropy(engine(x), y))
        with pytest.raises(
            RuntimeError,
            match=(
                r"^engine.step: it is called inside engine.no_sync\(\), where nothing is reduced; leave the context"
                r" first$"
            ),
        ):
            engine.step()
        with (
            pytest.raises(RuntimeError, match="^engine.no_sync: it is open already; leave the inner one out$"),
            engine.no_sync(),
        ):
            pass
    engine.step()
    with engine.coalesce_grad_reduction():
        engine.backward(F.cross_entropy(engine(x2), y2))
    engine.step()
    assert engine.global_steps == 1


class Outside(nn.Module):
    """Learns, and belongs to no engine."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("averaged,factor", [(True, 0.25), (False, 1.0)])
def test_what_learns_outside_gets_its_own_gradient_in_both_kinds(averaged, factor):
    engine, *_ = deepspeed.initialize(model=Net(), config=config(0, 4, "fp16"))
    out, (x, y) = Outside(), batches(0)[0]
    loss = F.cross_entropy((engine(x.half()).float() * out.t), y)
    want = torch.autograd.grad(loss, out.t, retain_graph=True)[0]
    engine.backward(loss, scale_wrt_gas=averaged)
    torch.testing.assert_close(out.t.grad, want * factor)

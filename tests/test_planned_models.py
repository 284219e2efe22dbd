"""Plans of what others wrote: routed experts, LSTMs, doubles, products that torch's counter does not know, one rank."""

from __future__ import annotations

import pytest
import torch
from test_planning import linear, step

import funczero as fz
from funczero import P
from funczero.planning.hollow import hollow
from funczero.planning.trace import flops_of

GROUPS = {  # of a grouped product: its two factors, and whether the ends of groups are said
    "rows": ((6, 4), (2, 4, 3), True),
    "batches": ((2, 6, 4), (2, 4, 3), False),
    "columns": ((2, 6, 4), (4, 3), True),
    "sums": ((6, 4), (4, 3), True),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_routed_experts_are_planned_and_counted(name, dtype):
    """In the dtypes that a CPU multiplies, of which torch's own form of shapes has one."""
    a, b, grouped = GROUPS[name]
    a, b = ([(n * 8 if n > 2 else n) for n in shape] for shape in (a, b))  # rows of 16 bytes
    ends = torch.tensor([16, 24 if name == "columns" else a[-1] if name == "sums" else a[0]], dtype=torch.int32)
    offs = ends if grouped else None
    want = torch._grouped_mm(torch.ones(a, dtype=dtype), torch.ones(b, dtype=dtype), offs)
    flops = []
    with hollow(lambda func, args, kwargs, out: flops.append(flops_of(func, args, kwargs, out))):
        found = torch._grouped_mm(torch.empty(a, dtype=dtype), torch.empty(b, dtype=dtype), offs)
    assert (found.shape, found.dtype) == (want.shape, want.dtype)
    groups = 2 if name == "batches" else 1
    assert sum(n or 0 for n in flops) == 2 * groups * 48 * 32 * 24


def test_a_plan_in_float64_is_the_one_in_float32_twice_as_wide():
    found = []
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        chain = fz.zero(fz.value_and_grad(linear, batch=P("data")), fz.clip_by_global_norm(1.0), fz.sgd(0.1), stage=1)
        batch = {"x": torch.empty(4, 3, dtype=dtype), "y": torch.empty(4, 2, dtype=dtype)}
        plan = fz.plan(
            fz.train_step(*chain, mesh={"data": 2}, policy=name), {"w": torch.empty(3, 2, dtype=dtype)}, batch
        )
        found.append((plan.memory.masters, plan.flops))
    assert found[1] == (2 * found[0][0], found[0][1])


def test_products_with_vectors_count_and_what_nobody_counts_is_named():
    def loss(p, b):
        x = b["x"] @ p["w"][:, 0]
        return torch.fft.rfft(x).abs().sum() + torch.dot(x, x), torch.tensor(4.0)

    batch = {"x": torch.empty(4, 3)}
    plan = fz.plan(step(1, loss, ()), {"w": torch.empty(3, 2)}, batch)
    assert plan.flops >= 2 * 4 * 3 + 2 * 4 and "_fft_r2c" in str(plan)


def test_a_plan_says_that_the_peak_of_an_lstm_lacks_what_its_kernel_keeps():
    module = torch.nn.LSTM(4, 4, batch_first=True)
    loss_fn, params = fz.stateless(module, lambda m, x: (m(x)[0].sum(), torch.tensor(float(len(x)))))
    plan = fz.plan(step(1, loss_fn, ()), params, torch.empty(2, 3, 4))
    assert "a run's are larger" in str(plan)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_reads_its_masters_after_its_first_update(stage):
    """There no view lies beside them, but of what is frozen."""
    params = {"w": torch.ones(3, 2), "still": torch.ones(5, 2)}

    def loss(p, b):
        found, weight = linear(p, b)
        return found + p["still"].sum(), weight

    chain = fz.zero(fz.value_and_grad(loss, batch=P("data"), trainable="w"), fz.sgd(0.1), stage=stage, accumulate=2)
    one = fz.train_step(*chain, mesh={"data": 1})
    batch = {"x": torch.ones(4, 3), "y": torch.ones(4, 2)}
    plan = fz.plan(one, params, batch)
    state = one.init(params)
    state, _ = one(state, batch)
    shared = [a.data_ptr() == b.data_ptr() for a, b in zip(state.views.buffers, state.params.buffers, strict=True)]
    apart = sum(b.nbytes for b, same in zip(state.views.buffers, shared, strict=True) if not same)
    assert plan.memory.views == apart > 0 and plan.memory.masters == sum(b.nbytes for b in state.params.buffers) > apart
    assert plan.memory.at_peak["masters"] == plan.memory.masters and plan.memory.at_peak["views"] == apart

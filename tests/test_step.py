"""What a step answers: its mesh, its views, a loss, the rows of a rank, the specs of a state."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.autograd import forward_ad

import funczero as fz
from funczero import P, tree
from funczero.layout.processes import world_size
from funczero.testing import tree_hash
from funczero.transforms.accumulate import Accumulate
from funczero.transforms.loss_scale import ScaleLoss

MESH = {"data": -1}


# --- states -----------------------------------------------------------------------------------------------------------
def found(stage):
    """What a step says of a state, and what it is."""
    step = zoo.make(stage, right=(fz.scale_loss(init=4.0), fz.adamw(1e-3)))
    state = step.init(zoo.params())
    own = step.state_of(state, ScaleLoss)
    more = step.with_state(state, own._replace(scale=own.scale * 2))
    same = own is state.chain["scale_loss"] and step.state_of(state, Accumulate) is None
    whole = tree_hash(step.whole_views(state).where.structure.unflatten(step.whole_views(state).leaves()))
    return (
        same,
        float(more.chain["scale_loss"].scale),
        float(own.scale),
        step.mesh.index("data"),
        whole == tree_hash(zoo.params()),
    )


@pytest.mark.parametrize("stage", range(4))
def test_a_step_finds_its_mesh_its_views_and_the_state_of_a_transform(run_world, stage):
    assert run_world(2, found, stage) == [(True, 8.0, 4.0, rank, True) for rank in range(2)]


def test_a_state_that_no_transform_keeps_is_refused():
    step = zoo.make(0)
    with pytest.raises(KeyError, match="no transform of this chain keeps a Accumulate; it has"):
        step.with_state(step.init(zoo.params()), Accumulate(torch.zeros(()), ()))


# --- views and losses -------------------------------------------------------------------------------------------------
def evaluated(stage, policy):
    """A loss over all rows, by the step and by hand."""
    step = zoo.make(stage, policy=policy)
    state, _ = step(step.init(zoo.params()), step.local_rows(zoo.batch(0)))
    b, size = zoo.batch(1), world_size()
    index = step.running().env.mesh.index("data")
    mine = {n: x.chunk(size)[index] for n, x in b.items()}
    out = step.eval(zoo.loss_plain)(state, mine)
    p = tree.map(lambda x: x.to(step.grad.env.policy.compute), step.params(state))
    loss, weight = zoo.loss_plain(p, b)
    return (
        out.loss.item() == pytest.approx((loss / weight).item(), rel=1e-6 if policy is None else 1e-2),
        out.weight.item() == weight.item(),
        out.loss.item(),
    )


def evaluations(policy):
    return [evaluated(stage, policy) for stage in range(4)]


@pytest.mark.parametrize("policy", [None, "compute=bfloat16"])
def test_eval_is_the_loss_of_the_whole_parameters(run_world, policy):
    for world in (1, 2):
        found = zoo.everywhere(run_world, world, evaluations, policy)
        assert all(near and weighs for near, weighs, _ in found) and len({loss for *_, loss in found}) == 1


def test_eval_neither_moves_a_state_nor_needs_a_gradient():
    step = zoo.make(3)
    state = step.init(zoo.params())
    before = tree_hash(state._asdict())

    def loss(p, b):
        assert not torch.is_grad_enabled()
        return zoo.forward(p, b, remat=True)

    assert (
        step.eval(loss)(state, zoo.batch(0)).weight == zoo.batch(0)["mask"].sum()
        and tree_hash(state._asdict()) == before
    )


def views_of(stage):
    step = zoo.make(stage, policy="compute=bfloat16")
    state, _ = step(step.init(zoo.params()), step.local_rows(zoo.batch(0)))
    views, masters = step.view(state), step.params(state)
    fresh = [x for x in tree.leaves(views) if x.requires_grad and x.is_leaf and x.dtype == torch.bfloat16]
    return (
        len(fresh),
        all(torch.equal(v, m.bfloat16()) for v, m in zip(tree.leaves(views), tree.leaves(masters), strict=True)),
        views["norm"] is views["head"]["scale"],
    )


@pytest.mark.parametrize("stage", range(4))
def test_views_are_the_cast_masters_as_fresh_leaves(run_world, stage):
    assert zoo.everywhere(run_world, 2, views_of, stage) == (len(tree.leaves(zoo.params())), True, True)


# --- rows -------------------------------------------------------------------------------------------------------------
def dealt():
    out = {}
    for name, (parts, _) in zoo.flat_chains(zoo.source(), 2, zoo.tx()).items():
        out[name] = fz.train_step(*parts, mesh=MESH).local_rows({"i": torch.arange(8)})["i"].tolist()
    return out


def test_rows_are_dealt_in_the_chains_order(run_world):
    """Two micro-batches of two rows on each of two ranks."""
    time_first, ranks_first = ([0, 1, 2, 3], [4, 5, 6, 7]), ([0, 1, 4, 5], [2, 3, 6, 7])
    a, b = run_world(2, dealt)
    for name in a:
        late = name in ("0 grad ar acc", "2 grad [acc", "3 [grad acc", "3 stream", "3 [acc(2) acc")
        assert (a[name], b[name]) == (ranks_first if late else time_first), name


def test_one_rank_and_one_micro_batch_are_given_what_they_gave():
    batch = zoo.batch(0)
    assert zoo.make(3).local_rows(batch) is batch


# --- specs ------------------------------------------------------------------------------------------------------------
def test_specs_mirror_the_state():
    meta = tree.map(lambda x: torch.empty_like(x, device="meta"), zoo.params())
    step = zoo.make(1, mesh={"data": 4}, right=(fz.scale_loss(), *zoo.tx()))
    specs = step.specs(meta)
    assert set(specs) == {"params", "views", "grads", "scale_loss", "adamw"}
    for part in (specs["params"], specs["views"], specs["grads"], specs["adamw"].mu):
        assert [n for n, _ in tree.paths(zoo.params())] == [
            n for n, _ in tree.paths(tree.map(lambda x: 0, part, is_leaf=lambda x: isinstance(x, P)))
        ]
    assert (
        specs["views"]["embed"] == P()
        and specs["adamw"].nu["embed"] == P("data")
        and specs["scale_loss"].scale == P() == specs["adamw"].count
    )


def test_what_torch_func_transforms_is_refused_and_the_remedy_takes_it():
    """A tangent of a bare dual level would be wrong in silence; torch's own words for the others name no step."""
    step = fz.train_step(fz.value_and_grad(lambda p, b: ((p["w"] * b).square().sum(), b.sum())), fz.sgd(0.1))
    state, ones = step.init({"w": torch.ones(3)}), torch.ones(3)
    smooth = fz.differentiable(step)
    of_state = lambda run: lambda w: fz.parts(run(fz.with_parts(state, {"w": w}), ones)[0])["w"].sum()
    of_rows = lambda run: lambda b: fz.parts(run(state, b)[0])["w"].sum()

    def dual(fn):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(fn(forward_ad.make_dual(ones, ones))).tangent

    transforms = [
        dual,
        lambda fn: torch.func.jvp(fn, (ones,), (ones,))[1],
        lambda fn: torch.func.grad(fn)(ones).sum(),
        lambda fn: torch.func.vmap(fn)(torch.stack([ones, ones])),
    ]
    for transform in transforms:
        for of, what in ((of_state, "state"), (of_rows, "batch")):
            with pytest.raises(RuntimeError, match=f"of its {what} is batched or differentiated by torch.func"):
                transform(of(step))
            assert transform(of(smooth)).isfinite().all()
    with pytest.raises(RuntimeError, match="step: it is called inside a transform of torch.func"):
        torch.func.grad(lambda x: step(state, ones)[1].loss * x)(torch.tensor(2.0))
    with forward_ad.dual_level():
        assert step(state, ones)[1].ok  # nothing of it has a tangent

"""The train step: states, views, specs, losses, counters, and what it prints."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P, tree
from funczero.layout.processes import world_size
from funczero.testing import simulate, tree_hash
from funczero.transforms.accumulate import Accumulate
from funczero.transforms.loss_scale import ScaleLoss

MESH = {"data": -1}


def make(stage, *, units=("blocks",), k=1, mesh=None, policy=None, tx=None, **kw):
    return fz.train_step(
        *fz.zero(zoo.source(units=units), *(tx or zoo.tx()), stage=stage, accumulate=k),
        mesh=mesh or MESH,
        policy=policy,
        **kw,
    )


# --- states -----------------------------------------------------------------------------------------------------------
def held(stage, policy):
    """What a fresh state is made of: dtypes, whether views are kept, and its parameters."""
    step = make(stage, policy=policy)
    state = step.init(zoo.params(), key=11)
    kind = None if state.views is None else str(state.views.buffers[0].dtype)
    return (
        kind,
        str(state.params.buffers[0].dtype),
        int(state.step),
        int(state.updates),
        int(state.key),
        tree_hash(step.params(state)) == tree_hash(zoo.params()),
    )


@pytest.mark.parametrize("stage", range(4))
def test_a_state_holds_masters_and_wider_views_only(run_world, stage):
    policy = "compute=bfloat16"
    kind = "torch.bfloat16" if stage in (1, 2) else None
    for world in (1, 2):
        assert zoo.everywhere(run_world, world, held, stage, policy) == (kind, "torch.float32", 0, 0, 11, True)


def test_parameters_are_copied_and_cast_to_the_policy():
    params = {"w": torch.ones(3, dtype=torch.bfloat16), "v": torch.ones(2)}
    g = fz.value_and_grad(lambda p, b: ((p["w"].sum() + p["v"].sum()) * b["x"].sum(), torch.ones(())), batch=P("data"))
    step = fz.donate(fz.train_step(g, fz.all_reduce("data"), fz.sgd(1.0), mesh=MESH))
    state, _ = step(step.init(params), {"x": torch.ones(1)})
    assert (
        params["w"].dtype == torch.bfloat16
        and params["w"].tolist() == [1.0] * 3
        and step.params(state)["w"].dtype == torch.float32
    )
    assert step.params(state)["w"].tolist() == [0.0] * 3


def test_any_tree_of_parameters_comes_back_as_it_was():
    for params in (
        torch.ones(2),
        [torch.ones(2), (torch.ones(1), {"a": torch.ones(())})],
        {"x": {"y": [torch.ones(3)]}},
    ):
        g = fz.value_and_grad(
            lambda p, b: (sum(x.sum() for x in tree.leaves(p)) * b["x"].sum(), torch.ones(())), batch=P("data")
        )
        step = fz.train_step(fz.shard("data", g, fz.sgd(1.0)), mesh=MESH)
        state, _ = step(step.init(params), {"x": torch.ones(1)})
        assert tree.flatten(step.params(state))[1] == tree.flatten(params)[1] and all(
            (x == 0).all() for x in tree.leaves(step.params(state))
        )


def found(stage):
    """What a step says of a state, and what it is."""
    step = make(stage, tx=(fz.scale_loss(init=4.0), fz.adamw(1e-3)))
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
    step = make(0)
    with pytest.raises(KeyError, match="no transform of this chain keeps a Accumulate; it has"):
        step.with_state(step.init(zoo.params()), Accumulate(torch.zeros(()), ()))


def test_counters_count_calls_and_applied_updates():
    step = make(3)
    state, log = step.init(zoo.params()), []
    for t in range(zoo.BAD - 1, zoo.BAD + 2):
        state, m = step(state, zoo.batch(t))
        log.append((int(state.step), int(state.updates), int(m.updates), m.ok.item()))
    assert log == [(1, 1, 1, True), (2, 1, 1, False), (3, 2, 2, True)]


def test_metrics_are_tensors_without_dims():
    _, m = make(2)(make(2).init(zoo.params()), zoo.batch(0))
    assert all(x.shape == () for x in m[:-1]) and m.aux is None
    assert [str(x.dtype).removeprefix("torch.") for x in m[:-1]] == [
        "float64",
        "float64",
        "float64",
        "bool",
        "bool",
        "float64",
        "float64",
        "int64",
    ]
    assert m.scale == 1 and m.lr == zoo.LR and m.weight == zoo.batch(0)["mask"].sum()


# --- views and losses -------------------------------------------------------------------------------------------------
def evaluated(stage, policy):
    """A loss over all rows, by the step and by hand."""
    step = make(stage, policy=policy)
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
    step = make(3)
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
    step = make(stage, policy="compute=bfloat16")
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
    assert make(3).local_rows(batch) is batch


# --- specs and print --------------------------------------------------------------------------------------------------
def test_specs_mirror_the_state():
    meta = tree.map(lambda x: torch.empty_like(x, device="meta"), zoo.params())
    step = make(1, mesh={"data": 4}, tx=(fz.scale_loss(), *zoo.tx()))
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


PRINTED = {
    0: (
        """
      value_and_grad(batch=P('data'))  -> sum, unreduced over ['data']
      accumulate(2)                    -> sum, unreduced over ['data'], of 2 micro-batches
      all_reduce('data')               -> sum, of 8 micro-batches
      mean                             -> mean, of 8 micro-batches
      sgd                              -> new parameters, of 8 micro-batches
    """
    ),
    1: (
        """
      value_and_grad(batch=P('data'))  -> sum, unreduced over ['data']
      accumulate(2)                    -> sum, unreduced over ['data'], of 2 micro-batches
      shard('data',                    -> sum, sharded over ['data'], of 8 micro-batches
        mean                           -> mean, sharded over ['data'], of 8 micro-batches
        sgd                            -> new parameters, sharded over ['data'], of 8 micro-batches
      )                                -> new parameters, of 8 micro-batches
    """
    ),
    3: (
        """
      shard('data',
        value_and_grad(batch=P('data'))  -> sum, sharded over ['data'], of 4 micro-batches
        accumulate(2)                    -> sum, sharded over ['data'], of 8 micro-batches
        mean                             -> mean, sharded over ['data'], of 8 micro-batches
        sgd                              -> new parameters, sharded over ['data'], of 8 micro-batches
    """
    ),
}


@pytest.mark.parametrize("stage", PRINTED)
def test_a_step_prints_its_layouts(stage):
    step = make(stage, k=2, mesh={"data": 4}, tx=(fz.sgd(0.1),))
    _, *lines = str(step).splitlines()
    want = [line[4:] for line in PRINTED[stage].strip("\n").splitlines()[:-1]]
    assert [line.rstrip() for line in lines] == want
    assert repr(step).startswith("<Step ") and ", donated" in str(fz.donate(step)).splitlines()[0]


def three(k):
    """Bits of two updates on this world, by stage."""
    out = []
    for stage in range(4):
        step = make(stage, k=k)
        state = step.init(zoo.params())
        for t in range(2):
            state, _ = step(state, step.local_rows(zoo.batch(t, micros=3 * k)))
        out.append(tree_hash(step.params(state)))
    return out


@pytest.mark.parametrize(("k", "kinds"), [(1, 1), (2, 2)])
def test_three_ranks_have_the_bits_that_the_note_says(k, kinds):
    """The same at every run; with micro-batches to add as well, stages 2 and 3 add ranks first and have others than 0
    and 1.
    """
    bits = simulate({"data": 3})(three, k)[0]
    assert (
        bits == simulate({"data": 3})(three, k)[0]
        and bits[0] == bits[1]
        and bits[2] == bits[3]
        and len(set(bits)) == kinds
    )
    note = (
        "  note: {'data': 3} is no power of two: the same bits at every run of this world, other bits in other worlds"
    )
    more = ", and in other orders of these sums (stages 2 and 3 against 0 and 1)"
    assert str(make(1, k=k, mesh={"data": 3})).splitlines()[-1] == note + more * (kinds - 1)


# --- meshes, checks, purposes -----------------------------------------------------------------------------------------
def test_without_a_mesh_all_processes_are_on_the_batchs_axis():
    parts = fz.zero(zoo.source(), *zoo.tx(), stage=2)
    assert fz.train_step(*parts).mesh.sizes() == {"data": 1}
    with pytest.raises(
        fz.ChainError,
        match=r"the batch is split over \['node', 'local'\]; write their sizes, as mesh=\{'node': 2, 'local': 2\}",
    ):
        fz.train_step(zoo.source(("node", "local")), fz.all_reduce("node"), fz.all_reduce("local"), *zoo.tx())


def unsplit():
    """A batch that is not split, on purpose: every rank sees all rows, and no gradient is sent."""
    step = fz.train_step(
        fz.value_and_grad(zoo.loss_plain, replicated=("data",)), fz.accumulate(8), *zoo.tx(), mesh=MESH
    )
    state = step.init(zoo.params())
    with fz.count_bytes(step) as sent:
        state, m = step(state, step.local_rows(zoo.batch(0)))
    return tree_hash(step.params(state)), m.weight.item(), set(sent)


def test_a_batch_that_is_not_split_is_seen_whole_and_sends_the_one_sum_in_which_ranks_compare(run_world):
    *same, sent = zoo.everywhere(run_world, 2, unsplit)
    assert same == list(unsplit()[:2]) and unsplit()[2] == set()
    assert sent == {("data", "all_reduce", "int64")}


def test_donating_twice_is_donating():
    step = fz.donate(fz.donate(make(3)))
    state, _ = step(step.init(zoo.params()), zoo.batch(0))
    assert int(step(state, zoo.batch(1))[0].step) == 2


def test_only_the_last_state_of_a_donated_run_is_of_use():
    step = fz.donate(make(0))
    first = step.init(zoo.params())
    second, _ = step(first, zoo.batch(0))
    third, _ = step(second, zoo.batch(1))
    for used, at in ((first, 0), (second, 1)):
        with pytest.raises(RuntimeError, match=f"this state was donated at step {at} and its memory is in use"):
            step(used, zoo.batch(2))
    step(third, zoo.batch(2))

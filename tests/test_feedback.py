"""What wires with memory keep: leaves of the state by axis, one a rank, which a sum renews and a skip does not."""

from __future__ import annotations

import pytest
import torch
import zoo
from layouts import CPU, structure

import funczero as fz
from funczero.comm.edge import Edge
from funczero.comm.wire import as_born
from funczero.core.types import Env, Grad, Layout, Seed, Updated
from funczero.layout.cut import Rules
from funczero.layout.mesh import Axis, plan_mesh
from funczero.layout.slots import Slots
from funczero.testing import tree_hash
from funczero.transforms.feedback import Feedback, empty, held, kept_where_skipped, name_of, of_axes, remembers, renewed

WIRE = fz.feedback(fz.int8(16), every=3)
SEED = Seed(torch.tensor(8.0), 0)


def world(**sizes):
    """Where a chain runs whose sums over `a` remember and over `b` do not; nothing is connected."""
    mesh = plan_mesh({})._replace(axes={a: Axis(n, n - 1, "") for a, n in sizes.items()})
    edges = {a: Edge(a, Rules(), scatter=WIRE if a == "a" else as_born) for a in sizes}
    return Env(mesh, fz.Policy.parse("compute=bfloat16"), edges)


def made(env, sharded=(), unreduced=("a",)):
    """The zoo's memory of axis a, of leaves that learn."""
    params = structure(zoo.params(), ("blocks",), env.rules, lambda path: path == "conv")
    return params, empty(params, env, "a", sharded, unreduced)


def test_a_sum_remembers_where_its_wire_does_and_there_is_somebody_to_send_to():
    assert [remembers(world(a=n, b=2), axis) for n in (1, 2) for axis in ("a", "b")] == [False, False, True, False]


def test_memory_begins_empty_at_the_place_of_what_is_summed():
    env = world(b=2, a=2)
    params, state = made(env, sharded=("b",), unreduced=("a",))
    ((name, own),) = state.items()
    where = own.errors.where
    assert name == name_of("a") == "feedback@a" and own.count == 0 and own.count.dtype == torch.int64
    assert where.coords == (("b", 2, 1),) and where.terms == (("a", 2, 1),)  # this rank's own, of two
    assert all(b.dtype == torch.float32 and not b.any() for b in own.errors.buffers)  # policy.accumulate
    frozen = [u.frozen for u in params.structure.units]
    assert [b.numel() == 0 for b in own.errors.buffers] == frozen and any(frozen)


def test_a_sum_is_handed_the_memory_without_terms_and_the_scale_of_the_loss():
    _, state = made(world(a=2))
    found = held(state, "a", SEED)
    assert found.scale == 8 and found.errors.where.terms == () and held(state, "b", SEED) is None
    assert all(x is y for x, y in zip(found.errors.buffers, state["feedback@a"].errors.buffers, strict=True))
    assert of_axes(state, ("b", "a"), SEED).keys() == {"a"}


def test_what_a_sum_leaves_is_kept_as_this_ranks_and_emptied_after_so_many():
    env = world(a=2)
    _, state = made(env)
    edge, first = env.edges["a"], state["feedback@a"]
    counts, sums = [], []
    for n in range(1, 8):
        errors = held(state, "a", SEED).errors.map(lambda b, n=n: torch.full_like(b, n))
        before, state = state, renewed(state, edge, errors)
        own = state["feedback@a"]
        counts.append(int(own.count))
        sums.append(own.errors.buffers[0][0].item())
        assert own.errors.where == first.errors.where and before["feedback@a"] is not own
    assert counts == [1, 2, 0, 1, 2, 0, 1] and sums == [1, 2, 0, 4, 5, 0, 7]
    assert renewed(state, edge, None) is state and not first.errors.buffers[0].any()


def updating(env, ok, moved):
    """A chain that moves its memory and another leaf of the state, and says whether the update counts."""
    nothing = Updated(*[torch.zeros(())] * 2, None, None, torch.zeros(()), torch.tensor(ok))

    def apply(views, state, batch, seed):
        new = {k: Feedback(x.errors.map(lambda b: b + 1), x.count + 1) for k, x in state.items() if k[0] == "f"}
        return nothing if moved else None, {**state, **new, "count": state["count"] + 1}

    return Grad(lambda p: {}, lambda v, k: v, apply, Layout(phase="updated"), ("source",), env)


@pytest.mark.parametrize(("ok", "moved"), [(True, True), (False, True), (False, False)])
def test_a_skipped_update_keeps_memory_and_an_open_window_goes_on(ok, moved):
    """A window that is not closed has no update to skip: what its sums left stays."""
    env = world(a=2)
    _, state = made(env)
    state["count"] = torch.tensor(0)
    before = tree_hash(state["feedback@a"])
    _, new = kept_where_skipped(updating(env, ok, moved)).apply(None, state, None, SEED)
    kept = tree_hash(new["feedback@a"]) == before
    assert kept is (moved and not ok) and new["count"] == 1


def test_a_chain_without_memory_is_itself():
    g = updating(world(a=1, b=2), True, True)
    assert kept_where_skipped(g) is g


def test_a_memory_is_a_pytree_of_a_states_leaves():
    _, state = made(world(a=2))
    paths = [n for n, _ in fz.tree.paths(state)]
    assert paths[-1] == "feedback@a/count" and all(n.startswith("feedback@a/errors/buffers/") for n in paths[:-1])
    doubled = fz.tree.map(lambda x: x * 2, state["feedback@a"])
    assert isinstance(doubled.errors, Slots) and doubled.errors.buffers[0].device == CPU

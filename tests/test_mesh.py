"""Named processes: sizes, places and groups."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import zoo
from layouts import TORCHRUN
from torch.distributed.device_mesh import DeviceMesh

import funczero as fz
from funczero.layout.mesh import Axis, connect, located, plan_mesh
from funczero.testing import simulate


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        (None, {}),
        ({}, {}),
        ({"data": 4}, {"data": 4}),
        ({"data": -1}, {"data": 1}),
        ({"node": 1, "local": -1}, {"node": 1, "local": 1}),
    ],
)
def test_a_plan_needs_no_processes(alone, sizes, want):
    mesh = plan_mesh(sizes)
    assert mesh.sizes() == want and not mesh.connected and all(mesh.index(a) == 0 for a in want)
    assert str(mesh) == (", ".join(f"{a}={n}" for a, n in want.items()) or "no axes")


def test_a_mesh_of_this_process_needs_no_network():
    mesh = fz.make_mesh({"node": 1, "data": -1})
    assert isinstance(mesh, DeviceMesh) and mesh.mesh_dim_names == ("node", "data") and mesh.size() == 1
    assert plan_mesh(mesh).connected and connect(plan_mesh(mesh)).sizes() == {"node": 1, "data": 1}


def places(sizes):
    """This rank's place, its groups' members, and whether a second connection is the first one."""
    mesh = connect(plan_mesh(sizes))
    members = {a: sorted(gathered(mesh, a)) for a in sizes if sizes[a] > 1}
    return (
        [mesh.index(a) for a in sizes],
        members,
        connect(mesh) is mesh,
        bool(mesh.world_group),
        {a: mesh.axes[a].group == "" for a in sizes},
    )


def gathered(mesh, axis):
    """The ranks that share an axis with this one."""
    out = torch.ops._c10d_functional.all_gather_into_tensor(
        torch.tensor([dist.get_rank()]), mesh.axes[axis].size, mesh.axes[axis].group
    )
    return torch.ops._c10d_functional.wait_tensor(out).tolist()


def test_ranks_lie_in_rows_of_the_last_axis(run_world):
    found = run_world(4, places, {"node": 2, "one": 1, "local": 2})
    assert [at for at, *_ in found] == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert [m for _, m, *_ in found] == [
        {"node": [r % 2, r % 2 + 2], "local": [r // 2 * 2, r // 2 * 2 + 1]} for r in range(4)
    ]
    assert all(
        same and whole and alone == {"node": False, "one": True, "local": False} for *_, same, whole, alone in found
    )


def meshes_given():
    """One update on a mesh by sizes, on torch's own, and on a Mesh that another step connected."""
    made = fz.make_mesh({"data": 2})
    parts = fz.zero(zoo.source(), *zoo.tx(), stage=3, accumulate=4)
    first = fz.train_step(*parts, mesh=made)
    return {zoo.bits(zoo.train(parts, mesh, updates=1)) for mesh in ({"data": -1}, {"data": 2}, made, first.mesh)}


def test_a_mesh_is_sizes_or_torchs_own(run_world):
    assert all(len(found) == 1 for found in run_world(2, meshes_given))


@pytest.mark.parametrize(("rank", "want"), [(0, (0, 0)), (3, (0, 3)), (4, (1, 0)), (7, (1, 3))])
def test_a_place_is_known_before_the_world_is_joined(alone, monkeypatch, rank, want):
    for name, value in {**TORCHRUN, "RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    mesh = located(plan_mesh({"node": 2, "local": -1}))
    assert tuple(mesh.axes) == ("node", "local") and not mesh.connected
    assert (mesh.index("node"), mesh.index("local")) == want and mesh.rank(("node", "local")) == (rank, 8)
    assert mesh.coords(("local",)) == (("local", 4, want[1]),)


def test_nobody_has_a_place_on_a_plan_for_another_world(alone):
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=3), mesh={"data": 4})
    assert step.mesh.sizes() == {"data": 4} and str(step.mesh) == "data=4" and step.mesh.device.type
    words = (
        "mesh: no process has a place on this axis of size 4 before the world is joined; call step.init or"
        " fz.init_distributed first, in a world that has the mesh's size"
    )
    for ask in (
        lambda m: m.index("data"),
        lambda m: m.axes["data"].index,
        lambda m: m.rank(("data",)),
        lambda m: m.coords(("data",)),
    ):
        with pytest.raises(RuntimeError) as e:
            ask(step.mesh)
        assert str(e.value) == words
    again = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=3), mesh=step.mesh)
    assert str(again) == str(step)


def indices():
    """What a step by sizes says of this rank before and after it runs, and what its live mesh says."""
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=3), mesh={"data": -1})
    before = step.mesh.index("data"), step.mesh.rank(("data",))
    step.init(zoo.params())
    live = step.running().env.mesh
    return (
        before == (step.mesh.index("data"), step.mesh.rank(("data",))) == (live.index("data"), live.rank(("data",))),
        before[0],
        step.mesh.sent is live.sent,
    )


def test_a_step_by_sizes_says_each_rank_its_own_place(run_world):
    assert run_world(2, indices) == [(True, r, True) for r in range(2)]


def test_coordinates_along_no_axis():
    mesh = plan_mesh({"a": 1})._replace(axes={"a": Axis(2, 1, ""), "b": Axis(3, 2, "")})
    assert mesh.coords(()) == () and mesh.rank(()) == (0, 1) and mesh.rank(("b", "a")) == (5, 6)


@pytest.mark.parametrize(
    ("hosts", "near"),
    [((1, 1, 1, 1), {"node", "local"}), ((1, 1, 2, 2), {"local"}), ((1, 2, 1, 2), {"node"}), ((1, 2, 3, 4), set())],
    ids=["one", "by row", "by column", "each"],
)
def test_an_axis_is_near_where_all_its_lines_lie_on_one_machine(monkeypatch, hosts, near):
    monkeypatch.setattr("funczero.layout.mesh.hosts_of_the_world", lambda: hosts)
    found = simulate({"node": 2, "local": 2})(lambda: connect(plan_mesh({"node": 2, "local": 2})).near)
    assert found == [near] * 4


def test_real_ranks_learn_whether_they_are_on_one_machine(run_world):
    for world in (1, 2):
        near = run_world(world, axes_near)
        assert near == [{"data"} if world > 1 else set()] * world


def axes_near():
    """The axes that lie on one machine, of a mesh that funczero made; a DeviceMesh that is given says nothing."""
    mesh = connect(plan_mesh({"data": -1}))
    assert connect(plan_mesh(fz.make_mesh({"data": -1}))).near == set()
    return set(mesh.near)

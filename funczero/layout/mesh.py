"""Named processes: the axes of a mesh, as a plan or with process groups."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from funczero.layout.processes import default_device, init_distributed, world_rank, world_size
from funczero.world import presence
from funczero.world.host import hosts_of_the_world
from funczero.world.inflight import InFlight
from funczero.world.ledger import Ledger
from funczero.world.sent import Sent

Coords = tuple[tuple[str, int, int], ...]  # (mesh axis, its size, a rank's index on it), outermost first


class Axis(NamedTuple):
    """One axis of a mesh as this process sees it."""

    size: int
    index: int  # type: ignore[assignment]  # this process's place on it, in place of the tuple's method
    group: str  # name of its process group; "" while none is needed or known


class Planned(Axis):
    """An axis of a mesh that is only a plan: it has a size, and nobody has a place on it."""

    __slots__ = ()

    @property
    def index(self) -> int:  # type: ignore[override]
        """Not known.

        Raises:
          RuntimeError: always.
        """
        raise RuntimeError(
            f"mesh: no process has a place on this axis of size {self.size} before the world is joined; "
            "call step.init or fz.init_distributed first, in a world that has the mesh's size"
        )


class Mesh(NamedTuple):
    """What a chain needs of a mesh: sizes, places, group names, the device and the count of what was sent."""

    axes: dict[str, Axis]
    device: torch.device
    sent: Sent  # by this process
    ledger: Ledger  # the checksum of all launches, which ranks compare; shared by all copies, as `sent` is
    flight: InFlight  # what the backend may still hold when the process ends
    world_group: str = ""  # the group of all, where the mesh spans them
    connected: bool = False
    near: frozenset[str] = frozenset()  # the axes of which all processes are known to be on one machine
    gathers_into: bool = False  # its groups are of torch's own kind, which gathers into a tensor that it is given
    stands_for: str = ""  # of a plan without values: the type of device that a run would be on

    @property
    def sends_from(self) -> str:
        """The type of device that messages leave from."""
        return self.stands_for or self.device.type

    def sizes(self) -> dict[str, int]:
        """Axis sizes by name."""
        return {name: a.size for name, a in self.axes.items()}

    def index(self, axis: str) -> int:  # type: ignore[override]  # in place of the tuple's method
        """This process's place on an axis."""
        return self.axes[axis].index

    def coords(self, axes: tuple[str, ...]) -> Coords:
        """This process's coordinates along some axes, as Where wants them."""
        return tuple((name, self.axes[name].size, self.axes[name].index) for name in axes)

    def rank(self, axes: tuple[str, ...]) -> tuple[int, int]:
        """This process among those along some axes, outermost first, and their number.

        >>> axes = {"a": Axis(2, 1, ""), "b": Axis(3, 2, "")}
        >>> Mesh(axes, torch.device("cpu"), Sent(), Ledger(), InFlight()).rank(("a", "b"))
        (5, 6)
        """
        index, size = 0, 1
        for _, n, i in self.coords(axes):
            index, size = index * n + i, size * n
        return index, size

    def __str__(self) -> str:
        return ", ".join(f"{name}={a.size}" for name, a in self.axes.items()) or "no axes"


def _resolve(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Sizes with -1 filled in, checked."""
    out = dict(sizes)
    for name, n in out.items():
        if not isinstance(name, str) or not isinstance(n, int) or isinstance(n, bool) or (n < 1 and n != -1):
            raise ValueError(
                f"mesh: axis {name!r} has size {n!r}; write a positive number of processes, or -1 for all that are left"
            )
    free = [name for name, n in out.items() if n == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: only one axis can be -1, but {free} are; write the size of the others")
    if free:
        rest = prod(n for n in out.values() if n != -1)
        if world % rest:
            raise ValueError(
                f"mesh {dict(sizes)}: {world} processes do not divide into {rest} for the axes with a size; start a"
                f" multiple of {rest} processes"
            )
        out[free[0]] = world // rest
    return out


def make_mesh(sizes: Mapping[str, int], device: str | None = None) -> DeviceMesh:
    """torch's DeviceMesh of all processes, by axis name, outermost first; -1 takes all that are left.

    This is the only place that creates process groups. A collective: every process of the world calls it.

    Raises:
      ValueError: the sizes do not multiply to the world.
    """
    world = init_distributed()
    full = _resolve(sizes, world.size)
    if prod(full.values()) != world.size:
        raise ValueError(_wrong_world(full, world.size))
    if not dist.is_initialized():  # a world of one: a group of this process alone, no network
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device or default_device().type, tuple(full.values()), mesh_dim_names=tuple(full))


def _wrong_world(sizes: Mapping[str, int], world: int) -> str:
    need = prod(sizes.values())
    first = next(iter(sizes), "data")
    return (
        f"mesh {dict(sizes)} needs {need} processes, but this world has {world}; start torchrun"
        f" --nproc-per-node={need}, or write {{{first!r}: -1}}"
    )


def plan_mesh(mesh: Mapping[str, int] | DeviceMesh | Mesh | None, device: str | None = None) -> Mesh:
    """A mesh to build, print and check a chain with; joins no world and creates no group."""
    if isinstance(mesh, Mesh):  # of another step; a plan is that of the first rank
        planned = {name: Axis(a.size, 0, "") for name, a in mesh.axes.items()}
        return mesh if mesh.connected else mesh._replace(axes=planned)
    with suppress(RuntimeError):  # in a world that somebody else joined; whoever needs its store says that it is gone
        presence.announce()
    if isinstance(mesh, DeviceMesh):
        return _connected(mesh)
    if mesh is not None and not isinstance(mesh, Mapping):
        raise TypeError(f"mesh: {mesh!r} is neither a dict of axis sizes nor a DeviceMesh; write mesh={{'data': -1}}")
    sizes = _resolve(mesh or {}, world_size())
    where = torch.device(device) if device else default_device()
    axes = {name: Axis(n, 0, "") for name, n in sizes.items()}
    return Mesh(axes, where, Sent(), Ledger(), InFlight())


def located(mesh: Mesh) -> Mesh:
    """The same mesh with this process's place on it, as far as that is known without joining a world.

    It is known from the world that was joined, or is to be: a launcher's environment names the rank. A mesh of another
    size than the world's is a plan, on which nobody has a place. Asking for one raises, since 0 on every rank would be
    wrong.
    """
    if mesh.connected:
        return mesh
    size, axes = world_size(), {}
    if prod(mesh.sizes().values()) != size:
        return mesh._replace(axes={name: Planned(a.size, 0, "") for name, a in mesh.axes.items()})
    rank = world_rank()
    for name, a in reversed(mesh.axes.items()):  # ranks lie in rows of the last axis
        axes[name] = a._replace(index=rank % a.size)
        rank //= a.size
    return mesh._replace(axes=dict(reversed(axes.items())))


def connect(mesh: Mesh) -> Mesh:
    """The same mesh with its process groups: joins the world, once. Axes of size 1 need none."""
    if mesh.connected:
        return mesh
    world = init_distributed()
    sizes = mesh.sizes()
    if prod(sizes.values()) != world.size:
        raise ValueError(_wrong_world(sizes, world.size))
    if world.size == 1:
        return mesh._replace(connected=True)
    presence.announce()
    try:
        shared = _shared_mesh(dist.group.WORLD, tuple(sizes.items()), mesh.device.type)
        live = _connected(shared, mesh.ledger, _hosts(dist.group.WORLD) if mesh.device.type == "cpu" else ())
    except RuntimeError as e:
        raise _lost(world.rank, e) from e
    return live._replace(sent=mesh.sent, device=mesh.device)


def _lost(rank: int, error: RuntimeError) -> RuntimeError:
    """What rank could not be reached, where that can be proven; else the backend's own words with where they came
    up.
    """
    gone, until = presence.ranks_that_ended(), time.monotonic() + 1.0
    while not gone and time.monotonic() < until:
        time.sleep(0.05)  # a process that was just killed
        gone = presence.ranks_that_ended()
    who = f"rank {gone[0]} ended" if gone else "the process groups could not be made"
    return RuntimeError(
        f"mesh: {who} while rank {rank} was connecting to the others ({str(error).splitlines()[0]}); look for what"
        " ended it, and start all ranks again"
    )


@lru_cache(maxsize=16)
def _shared_mesh(world: dist.ProcessGroup | None, sizes: tuple[tuple[str, int], ...], device: str) -> DeviceMesh:
    """Steps of one world with the same axes share their process groups: each costs sockets and threads that torch
    never frees.
    """
    return make_mesh(dict(sizes), device)


@lru_cache(maxsize=16)
def _hosts(world: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The machines of all ranks of a world, which do not move."""
    return hosts_of_the_world()


def _connected(mesh: DeviceMesh, ledger: Ledger | None = None, hosts: tuple[int, ...] = ()) -> Mesh:
    """The mesh as this process sees it.

    Args:
      hosts: of all ranks; unknown of a DeviceMesh that somebody else made, whose axes then are not called near.
    """
    names = mesh.mesh_dim_names
    if not names:
        raise ValueError("mesh: this DeviceMesh has no mesh_dim_names; make it with fz.make_mesh({'data': -1})")
    place = mesh.get_coordinate()
    if place is None:
        raise ValueError(
            f"mesh: rank {dist.get_rank()} is not part of this DeviceMesh; build one over all ranks with fz.make_mesh"
        )
    groups = {n: mesh.get_group(d) for d, n in enumerate(names) if mesh.size(d) > 1}
    axes = {n: Axis(mesh.size(d), place[d], groups[n].group_name if n in groups else "") for d, n in enumerate(names)}
    lines = {n: dist.get_process_group_ranks(g) for n, g in groups.items() if hosts}
    near = frozenset(n for n, ranks in lines.items() if len({hosts[r] for r in ranks}) == 1)
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    everyone = dist.group.WORLD if dist.get_world_size() == mesh.size() else None
    group = "" if everyone is None else everyone.group_name
    into = all(type(g) is dist.ProcessGroup for g in groups.values())  # a group in Python has no such form
    out = Mesh(axes, device, Sent(), ledger or Ledger(), InFlight(), group, connected=True)
    out = out._replace(near=near, gathers_into=into)
    out.ledger.joined(*out.rank(tuple(axes)), device)
    return out

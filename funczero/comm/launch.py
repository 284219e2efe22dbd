"""One flat buffer over one mesh axis: the only module that sends. Launch, then wait; every byte is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from funczero.core.number import dtype_name
from funczero.core.spans import span
from funczero.layout.mesh import Mesh
from funczero.world.sent import Sent

SHORT = 1 << 15  # bytes on all wires under which a sum is all latency
DIRECT = 1 << 18  # bytes on all wires up to which an exchange gathers sooner than gloo's ring, wherever the ranks are
_ops = torch.ops._c10d_functional  # pure, asynchronous and traceable; private to torch, hence used here alone


class HasMesh(Protocol):
    """Whatever sends over a mesh, as a Step does."""

    @property
    def mesh(self) -> Mesh:
        """The mesh with its count."""


@contextmanager
def count_bytes(step: HasMesh | Mesh) -> Iterator[Sent]:
    """Counts what this process sends while it is open: (axis, verb, dtype or wire) -> bytes, payload only.

    Printed, it is a table, which also says what the same values would take in 16 bits.

    Args:
      step: a Step or its Mesh.
    """
    mesh = step if isinstance(step, Mesh) else step.mesh
    before, counter = mesh.sent.copy(), Sent()
    yield counter
    now = mesh.sent.since(before)
    counter.update(now)
    counter.numbers.update(now.numbers)


def _sent(
    mesh: Mesh, axis: str, verb: str, form: torch.dtype | str, n: int, values: int, units: tuple[int, ...] = ()
) -> AbstractContextManager[Any]:
    """Counted and entered in the ledger; what is launched inside has its name in a trace."""
    name = form if isinstance(form, str) else _name_of(form)
    mesh.sent.note((axis, verb, name), n, values)
    mesh.ledger.note(verb, axis, name, n, units)
    return span(verb, axis)


_name_of = cache(dtype_name)


def launch_gather(
    x: Tensor, axis: str, mesh: Mesh, units: tuple[int, ...] = (), form: str = "", values: int | None = None
) -> Tensor:
    """Start to gather [n] into [W, n]; finish with wait.

    Args:
      units: whose values these are, for ranks to compare.
      form: the wire that packed them; by default their dtype is counted.
      values: how many it packed.
    """
    size, _, group = mesh.axes[axis]
    if size == 1:
        return x.view(1, -1)
    values = x.numel() if values is None else values
    with _sent(mesh, axis, "all_gather", form or x.dtype, x.nbytes * (size - 1), values * (size - 1), units):
        return _gather_rows(x, size, group, mesh)


def apart(nbytes: int, axis: str, mesh: Mesh) -> bool:
    """Is a gather of so many bytes a rank better launched by `launch_others`? From a CPU, within one machine, a long
    one: it takes no longer than gloo's ring, without a copy of what this rank has, and gloo's threads keep no memory.

    Between machines a long message goes round the ring, which crosses from one to the next once.
    """
    return axis in mesh.near and mesh.sends_from == "cpu" and nbytes * mesh.axes[axis].size > DIRECT


def launch_others(x: Tensor, axis: str, mesh: Mesh, units: tuple[int, ...] = ()) -> Tensor:
    """Start to gather [n] of the other ranks of an axis of more than one, in their order: [W - 1, n].

    Args: as launch_gather's.
    """
    size, index, group = mesh.axes[axis]
    n = x.numel()
    splits = [0 if q == index else n for q in range(size)]
    with (
        _sent(mesh, axis, "all_gather", x.dtype, x.nbytes * (size - 1), n * (size - 1), units),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        rows = x.expand(size - 1, -1).reshape(-1)
        return mesh.flight.note(rows, _ops.all_to_all_single(rows, splits, splits, group)).view(size - 1, n)


def _gather_rows(x: Tensor, size: int, group: str, mesh: Mesh) -> Tensor:
    """[n] to [W, n]. From a CPU what is short goes to every rank directly, in half of the latency of gloo's ring.

    The ring is launched in the form that is given its output. gloo's threads write the name of what they completed last
    into one string without a lock, and where the name of the other form, `ALLGATHER_COALESCED`, which is too long to
    lie in the string itself, meets another, a thread writes into memory that is free (torch 2.13; seen as "malloc():
    unaligned tcache chunk detected").
    """
    with torch._C._AutoDispatchBelowAutograd():  # nothing here is differentiated by torch: skip its Python rules
        if mesh.sends_from == "cpu" and x.nbytes * size <= DIRECT:
            rows = x.expand(size, -1).reshape(-1)
            splits = [x.numel()] * size
            return mesh.flight.note(rows, _ops.all_to_all_single(rows, splits, splits, group)).view(size, -1)
        if not mesh.gathers_into:
            return mesh.flight.note(x, _ops.all_gather_into_tensor(x, size, group)).view(size, -1)
        out = x.new_empty(size * x.numel())
        return mesh.flight.note(x, _ops.all_gather_into_tensor_out(x, size, group, out=out)).view(size, -1)


def launch_exchange(
    x: Tensor, axis: str, mesh: Mesh, units: tuple[int, ...] = (), form: str = "", values: int | None = None
) -> Tensor:
    """Start to send row q of [W, n] to rank q; the rows that arrive are the ranks' in order.

    Args: as launch_gather's; values are those of one row.
    """
    size, _, group = mesh.axes[axis]
    if size == 1:
        return x
    values = x.numel() // size if values is None else values
    n, sent = x.nbytes * (size - 1) // size, values * (size - 1)
    with _sent(mesh, axis, "reduce_scatter", form or x.dtype, n, sent, units), torch._C._AutoDispatchBelowAutograd():
        return mesh.flight.note(x, _ops.all_to_all_single(x, [1] * size, [1] * size, group))


def launch_uneven(
    x: Tensor, sent: list[int], received: list[int], axis: str, mesh: Mesh, alike: int, units: tuple[int, ...] = ()
) -> Tensor:
    """Start to send the stretches of [n], one a rank; what arrives are the ranks' stretches, one after another.

    Args:
      sent, received: elements by rank of the axis; some may be 0.
      alike: bytes that every rank of the mesh says of this launch, since those that it sends may differ.
    """
    size, index, group = mesh.axes[axis]
    if size == 1:
        return x
    values = sum(sent) - sent[index]
    mesh.sent.note((axis, "exchange", _name_of(x.dtype)), values * x.itemsize, values)
    mesh.ledger.note("exchange", axis, _name_of(x.dtype), alike, units)
    with span("exchange", axis), torch._C._AutoDispatchBelowAutograd():
        return mesh.flight.note(x, _ops.all_to_all_single(x, received, sent, group))


def launch_backend_scatter(x: Tensor, axis: str, mesh: Mesh, units: tuple[int, ...]) -> Tensor:
    """Start the backend's own reduce-scatter of [W, n], in whatever order it adds."""
    size, _, group = mesh.axes[axis]
    n, values = x.nbytes * (size - 1) // size, x.numel() * (size - 1) // size
    with _sent(mesh, axis, "reduce_scatter", x.dtype, n, values, units), torch._C._AutoDispatchBelowAutograd():
        return mesh.flight.note(x, _ops.reduce_scatter_tensor(x, "sum", size, group))


def launch_backend_sum(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
    """Start the backend's own all-reduce of [n], in whatever order it adds."""
    size, _, group = mesh.axes[axis]
    sent = 2 * x.nbytes * (size - 1) // size
    with (
        _sent(mesh, axis, "all_reduce", x.dtype, sent, sent // x.dtype.itemsize),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return mesh.flight.note(x, _ops.all_reduce(x, "sum", group))


def wait(x: Tensor) -> Tensor:
    """The tensor of a launched collective, complete."""
    with span("wait"), torch._C._AutoDispatchBelowAutograd():
        out: Tensor = _ops.wait_tensor(x)
    return out


def broadcast(x: Tensor, root: int, mesh: Mesh) -> Tensor:
    """The values of the world's rank `root` on every rank of a mesh that spans the world, bit for bit."""
    size = prod(mesh.sizes().values())
    if size == 1:
        return x
    axes, nbytes = "+".join(a for a, n in mesh.sizes().items() if n > 1), x.nbytes * (size - 1)
    if mesh.ledger.place == root:
        mesh.sent.note((axes, "broadcast", _name_of(x.dtype)), nbytes, nbytes // x.dtype.itemsize)
    mesh.ledger.note("broadcast", axes, _name_of(x.dtype), nbytes)
    with span("broadcast", axes), torch._C._AutoDispatchBelowAutograd():
        sent = mesh.flight.note(x, _ops.broadcast(x.detach().contiguous(), root, mesh.world_group))
    return wait(sent)


def sum_over(x: Tensor, name: str, size: int, group: str, mesh: Mesh, noted: bool) -> Tensor:
    """The sum of integers over one process group, complete.

    Args:
      name: of its axis or axes.
      noted: do ranks compare this launch? Not where it carries their checksums itself.
    """
    short = mesh.sends_from == "cpu" and x.nbytes * size <= SHORT
    nbytes = x.nbytes * (size - 1) if short else 2 * x.nbytes * (size - 1) // size
    if noted:
        _sent(mesh, name, "all_reduce", x.dtype, nbytes, 0)
    else:  # it stands in the ledger already, by its own checksum
        mesh.sent.note((name, "all_reduce", _name_of(x.dtype)), nbytes, 0)
    with span("all_reduce", name), torch._C._AutoDispatchBelowAutograd():
        flying = _gather_rows(x, size, group, mesh) if short else mesh.flight.note(x, _ops.all_reduce(x, "sum", group))
    return wait(flying).sum(0) if short else wait(flying)

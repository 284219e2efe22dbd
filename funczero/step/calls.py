"""Calls that all ranks must make alike: what they launch is entered in the mesh's ledger, with their context."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from funczero.core import exhausted, rows, tree
from funczero.core.spans import span
from funczero.core.types import Grad, Metrics, TrainState
from funczero.layout.mesh import Mesh
from funczero.layout.processes import init_distributed, world_rank, world_size
from funczero.layout.slots import Slots
from funczero.step.alike import checksum, settings
from funczero.step.watch import Watch, in_words
from funczero.world.entries import Context
from funczero.world.ledger import NAN, Ledger


def recorded(name: str, fn: Callable[..., Any], running: Callable[[], Grad]) -> Callable[..., Any]:
    """fn(state, ...) as a call that all ranks must make alike."""

    def call(state: Any, *batch: Any) -> Any:
        whole = isinstance(state, TrainState) and isinstance(state.params, Slots)
        ledger = running().env.mesh.ledger if whole else None
        where = lambda: "beside the transforms: what a step reads and says of itself"
        with span(name), exhausted.asking(where, lambda: holding(name, state)):
            if ledger is None or ledger.ranks == 1:
                return fn(state, *batch)
            return _entered(ledger, name, fn, state, *batch)

    return call


def holding(name: str, state: TrainState) -> str:
    """What a state takes on this rank, by class."""
    kinds = {"parameters": state.params, "views": state.views, **state.chain}
    sizes = [f"{kind} {exhausted.size(tree.tensors(x))}" for kind, x in kinds.items() if tree.tensors(x)]
    now = int(state.step)
    now = now if now >= 0 else -1 - now  # of a state that this call has used up
    where = f"rank {world_rank()} of {world_size()}, {name} at step {now}"
    rest = "gathered parameters, activations, gradients and, but for what fz.donate reuses, the new state"
    return f"{where}: {exhausted.HOLDS} {', '.join(sizes)}; all else is {rest}"


def _entered(ledger: Ledger, name: str, fn: Callable[..., Any], state: TrainState, *batch: Any) -> Any:
    """fn(state, *batch) with its context in the ledger, and what it raises where others can see it."""
    watch, before, now = ledger.watch, ledger.context, int(state.step)
    tensors = rows.tensors(batch)
    have = "/".join(sorted({str(len(x)) for x in tensors if x.dim()}))
    spec, units = ledger.describe(state.params.where.structure)
    names, scalars = ledger.scalars(state.chain)
    ledger.enter(Context(name, now, int(state.key), scalars, spec, names, have, units))
    if ledger.replicated and tensors:
        ledger.mix_rows(torch.stack([checksum(x) for x in tensors]).tolist())
    within = watch is not None and watch.inside  # another call, in whose forward this one is made
    if watch is not None:
        watch.enter()
    try:
        out = fn(state, *batch)
    except BaseException as error:
        if watch is not None:
            watch.failed(error, f"{in_words(error)} in {name} at step {now}")
        raise
    finally:
        ledger.enter(before._replace(step=now))
        if watch is not None:
            watch.inside = within
    if type(out) is tuple and type(out[1]) is Metrics and out[1].lr.device.type == "cpu":
        lr = out[1].lr.item()
        ledger.lr = lr if lr == lr else NAN
    return out


def watch_of_world() -> Watch | None:
    """The thread that compares the launches of this world's ranks.

    None in a world of one, where ranks are simulated, or without a store that a thread can ask.
    """
    simulated = world_size() == 1 or dist.get_backend() in ("fake", "threaded")
    if simulated or not hasattr(dist.distributed_c10d._get_default_store(), "clone"):
        return None
    there = (t for t in threading.enumerate() if isinstance(t, Watch) and t.world is dist.group.WORLD)
    return next(there, None) or Watch()


def watched(
    mesh: Mesh, grad: Grad, check: int | bool, parts: Sequence[Any] = (), replicated: tuple[str, ...] = ()
) -> Mesh:
    """The mesh, whose ledger now knows the chain; with the thread that compares, unless no other rank could differ.

    Args:
      check: 0 leaves the thread out.
      parts: of the chain; the numbers they were built with are compared as well.
      replicated: axes whose ranks are given the same rows.
    """
    arrows = [f"{name} -> {layout.describe()}" for name, layout in zip(grad.names, grad.arrows, strict=True)]
    ledger: Ledger = mesh.ledger
    head = f"mesh {grad.env.mesh}, {grad.env.policy}, sums={grad.env.sums!r}, {grad.env.link}"
    head += "" if grad.env.capture is None else f", {grad.env.capture}"
    ledger.chain, ledger.replicated = [head, *arrows, *settings(parts)], replicated
    if not check or world_size() == 1 or prod(mesh.sizes().values()) != world_size():
        return mesh
    init_distributed()
    ledger.watch = watch_of_world()
    if ledger.watch is None:
        return mesh
    texts = ledger.watch.verdict.texts
    texts |= ledger.texts
    ledger.texts = texts
    if not mesh.connected:  # groups are about to be made, by all ranks
        ledger.enter(Context("train_step", spec=ledger.describe(None)[0]))
        ledger.note("connect", str(mesh))
    return mesh

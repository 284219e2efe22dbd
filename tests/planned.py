"""Plans beside what simulated ranks count: bytes of states and on the wire, and peaks of live storages."""

from __future__ import annotations

import torch
import zoo

import funczero as fz
from funczero.core.order import Dealt
from funczero.planning.update import bytes_of
from funczero.testing.simulate import simulate


def shapes(tree):
    """The same tree on the meta device; tied leaves stay tied."""
    known = {}
    return fz.tree.map(lambda x: known.setdefault(id(x), torch.empty_like(x, device="meta")), tree)


def counted(build, params, batch, mesh):
    """By rank of real ranks: (bytes sent in the second update, bytes of the state by what they are for)."""

    def rank():
        step = build(mesh)
        state = step.init(params)
        rows = step.local_rows(batch)
        assert not isinstance(rows, Dealt)
        for _ in range(2):
            with fz.count_bytes(step) as sent:
                state, metrics = updated(step, state, rows)
        return dict(sent), bytes_of(state), sum(b.nbytes for b in step.views(state).buffers)

    return simulate(mesh)(rank)


def updated(step, state, rows):
    """An update; of a stream all its calls."""
    if not step.grad.streams:
        return step(state, rows)
    k = next(n for name, n in reversed(step.grad.layout.order) if name == "accumulate")
    for micro in zoo.split(rows, k):
        state, _ = step(state, micro)
    return step(state, None)


def agrees(build, params, batch, mesh, ranks=None):
    """Asserts that every rank's plan, made on another mesh and from shapes alone, is what that rank counts."""
    alone = dict.fromkeys(mesh, 1)
    for rank, (sent, own, views) in enumerate(counted(build, params, batch, mesh)):
        if ranks is not None and rank not in ranks:
            continue
        plan = fz.plan(build(alone), shapes(params), shapes(batch), mesh=mesh, rank=rank)
        assert dict(plan.sent) == sent, (rank, plan.sent, sent)
        have = {"masters": plan.memory.masters, "moments": plan.memory.moments, "wires": plan.memory.wires}
        assert have == {k: own[k] for k in have}, rank
        assert plan.memory.model_state == own["model state"]
        assert plan.memory.views in (views, 0)

"""`train_step`: from the parts of a chain to a step that runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from funczero.core.exhausted import asking
from funczero.core.link import Link
from funczero.core.policy import Policy
from funczero.core.transform import refuse
from funczero.core.types import ChainError, Env, Grad, Metrics, TrainState, Updated
from funczero.layout.mesh import Mesh, connect, plan_mesh
from funczero.layout.slots import Slots
from funczero.step.alike import begin, given
from funczero.step.book import Book
from funczero.step.calls import recorded, watched
from funczero.step.describe import gathered
from funczero.step.fits import Fits, mark_used, packed, using_up
from funczero.step.initial import check_widening, initial, read_lazily
from funczero.step.look import dealt, looking, seed_of, seen
from funczero.step.notices import Early, narrow, nested, say
from funczero.step.step import Step, metrics_of
from funczero.transforms.accumulate import Accumulate
from funczero.transforms.chain import Source, build, chain, configured
from funczero.transforms.skips import Patience, Skipped, unapplied
from funczero.world.entries import UPDATE

SAID = 1 << 24  # bytes that a forward gathers whole, from which on the first update says so


def train_step(
    *parts: Any,
    mesh: Mapping[str, int] | DeviceMesh | Mesh | None = None,
    policy: str | Policy | None = None,
    sums: str = "tree",
    prefetch: bool = True,
    debug: bool = False,
    check: int | bool = True,
    patience: int = 20,
    link: Link | None = None,
) -> Step:
    """A step from a chain: a gradient, transforms, and an optimizer that applies the update.

    Args:
      parts: left to right; see value_and_grad, accumulate, shard, all_reduce, scale_loss, clip_by_global_norm, adamw,
        zero.
      mesh: axis sizes by name, outermost first, -1 for all that are left; or a DeviceMesh. A dict builds, prints and
        plans in any process; the world is joined at the first init. None: all processes on the one axis of the batch.
      policy: dtypes, as "params=float32,compute=bfloat16,accumulate=float32".
      sums: how gradients are added: in the one "tree" (the same bits on 1, 2, 4, ... ranks, at any stage); "exact", as
        integers, over time as well (the same bits on any number of ranks, whoever has which micro-batch; sums after the
        first one send 8 bytes a value, see transforms/exact.py); or over ranks by the "backend" as it likes.
      prefetch: start the next block's gather while one computes: one unit more in memory, the same bits.
      debug: log the first non-finite leaf of any update, and its rank.
      check: a thread compares what ranks launch, for ever, where no sum is reached any more: one that differs, left or
        died ends all with a message instead of a hang or an abort of the backend (watch.py). 0: no such thread; ranks
        are still compared in every sum (ledger.py).
      patience: after so many updates in a row that were not finite and were skipped, the next call raises on all ranks;
        those that a dynamic loss scale skips on its way down do not count. The first is said, with leaf and rank, and
        then ever fewer.
      link: what a message between ranks costs, the same on all ranks; by default gloo's on one machine. Neighbouring
        units that are small beside it travel together; Link(latency=0.0) sends each unit by itself. The same bits.

    Raises:
      ChainError: the chain cannot mean what it says; the message shows it with the correction.
    """
    flat = chain(*parts)
    if mesh is None and flat and isinstance(flat[0], Source):
        if len(flat[0].batch) > 1:
            raise ChainError(
                f"train_step: the batch is split over {list(flat[0].batch)}; write their sizes, as"
                f" mesh={{{', '.join(f'{a!r}: 2' for a in flat[0].batch)}}}"
            )
        mesh = dict.fromkeys(flat[0].batch, -1)
    if sums not in ("tree", "exact", "backend"):
        raise ValueError(f"train_step: sums={sums!r} is none of 'tree', 'exact' and 'backend'; write one of them")
    if link is not None and not isinstance(link, Link):
        raise TypeError(f"train_step: link={link!r} is no link; write fz.Link(latency=seconds, speed=bytes a second)")
    known = (link or Link()).checked("train_step(link=...)")
    planned = plan_mesh(mesh)
    env = Env(planned, Policy.parse(policy), {}, prefetch=prefetch, sums=sums, link=known)
    return _make(flat, env, Options(debug, check, patience), donated=False, book=Book())


def donate(step: Step) -> Step:
    """The same step with the same bits, in place: the state it is given is used up, and raises when it is used
    again.

    Where a call fails before it has written, as for want of memory in a forward, the state is as it was; where it fails
    later, it is used up as well.
    """
    return step.rebuild(True)


class Options(NamedTuple):
    """How a step watches its run."""

    debug: bool
    check: int
    patience: int


def _make(parts: tuple[Any, ...], env: Env, options: Options, donated: bool, book: Book) -> Step:
    planned = _built(parts, env._replace(donate=donated))
    source = configured(parts)
    early = Early(source.batch, rows=source.name == "value_and_grad")
    patience = Patience(options.patience, options.debug, lambda: _speaks(running()))

    @cache
    def running() -> Grad:
        return _built(
            parts,
            env._replace(
                mesh=connect(watched(env.mesh, planned, options.check, parts, source.replicated)),
                donate=donated,
                early=early,
            ),
        )

    @cache
    def probe() -> Grad:  # the same gradients, and nothing applied
        return _built(unapplied(parts), env._replace(mesh=running().env.mesh))

    @cache
    def looked() -> Grad:
        return _built(unapplied(parts, (seen,)), env._replace(mesh=running().env.mesh))

    def init(params: Any, key: int = 0) -> TrainState:
        g = running()
        own = read_lazily(source, g, params, g.env.mesh.device)
        check_widening(params, g.env.policy)
        begin(params, own.structure, key, g.env.mesh, g.env.model)
        if _speaks(g):
            say(book.said, narrow(params, g.env.policy), nested(params, source.units))
        state = initial(g, own, key)
        if state.views is not None and packed(g):  # as every later forward will see them
            state = state._replace(views=fits.views(state, made=False))
        book.add(state)
        return state

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics | None]:
        made, rows = fits.look(state), dealt(batch, source)
        with using_up(state) if donated else nullcontext():
            return updated(state, made, *rows)

    def updated(state: TrainState, made: bool, batch: Any, micros: int | None) -> tuple[TrainState, Metrics | None]:
        g = running()
        now, seen = int(state.step), _seen(book, state, patience)
        seed = seed_of(state, g.env.mesh.device, look=options.debug or seen.row > 0)._replace(micros=micros)
        with asking(lambda: "for views of the parameters"):
            views = fits.views(state, made)
        own = {**state.chain, "params": state.params}
        if early.open:
            early.before(state.params)
            if _begins(state, batch):
                given(batch, g.layout, g.env.mesh)
        out, new = g.apply(views, dict(own), batch, seed)
        masters = new.pop("params")
        if out is None:
            return fits.settled(state, views)._replace(chain=new), None
        assert isinstance(out, Updated)
        once_more = lambda: probe().apply(views, own, batch, seed._replace(look=True))[0]
        again = None if g.streams or source.name != "value_and_grad" else once_more
        seen = patience.after(seen, out, now, masters.where.structure.leaves, again)
        if early.open:
            said = early.after(out, masters, batch, g.layout)
            if early.updates == 1 and g.layout.rest and (whole := gathered(g, masters.where.structure, SAID)):
                said.append(f"train_step: {whole}; lists of blocks that are not found are named with units=(...)")
            say(book.said, *(said if _speaks(g) else ()))
        with asking(lambda: "for new views of the parameters"):
            wide = None if state.views is None else _renewed(out.params, views)
        fresh = TrainState(masters, wide, new, state.step + 1, state.updates + out.ok, state.key)
        book.add(fresh, seen)
        metrics = metrics_of(out, fresh)
        if donated:
            mark_used(state, now)
        return fresh, metrics

    fits = Fits(book, running, lambda g, meta: read_lazily(source, g, meta, torch.device("meta")))
    rebuild = lambda donating=donated, capture=env.capture: _make(
        parts, env._replace(capture=capture), options, donating, book
    )
    interpreted = lambda env, source=None: _built(parts if source is None else (source, *parts[1:]), env)
    looks = recorded("step.grads", looking(looked, fits, source), running)
    return Step(init, recorded(UPDATE, update, running), planned, running, source, rebuild, interpreted, fits, looks)


def _built(parts: tuple[Any, ...], env: Env) -> Grad:
    g = build(parts, env)
    if not g.layout.applied:
        raise refuse(g, "train_step", "no optimizer applies an update; end the chain with one, as adamw(3e-4)")
    if g.layout.sharded != g.layout.rest:
        left = [a for a in g.layout.sharded if a not in g.layout.rest]
        raise refuse(
            g,
            "train_step",
            f"the new parameters are still split over {left}; write shard({left[-1]!r}, ...) around what reduce_scatter"
            f" opened, or all_gather({left[-1]!r}) after it",
        )
    return g


def _begins(state: TrainState, batch: Any) -> bool:
    """Is this the first micro-batch of an update? Of a stream's others a rank may have fewer."""
    return batch is not None and not any(int(own.count) for own in state.chain.values() if isinstance(own, Accumulate))


def _renewed(new: Slots, old: Slots) -> Slots:
    """New views; frozen leaves were not sent and stay."""
    return new.to(old.buffers[0].dtype).placed(old.where.place, old.buffers[0].device).with_frozen(old)


def _seen(book: Book, state: TrainState, patience: Patience) -> Skipped:
    """What this state's line has skipped so far; where that was too much it is told, and counted anew."""
    line = book.line(state)
    if line is None or not line.skipped.row:
        return Skipped() if line is None else line.skipped
    seen, line.skipped = line.skipped, Skipped()
    patience.check(seen)
    line.skipped = seen
    return seen


def _speaks(g: Grad) -> bool:
    """Is this the rank that says what all ranks know?"""
    return g.env.mesh.rank(tuple(g.env.mesh.axes))[0] == 0

"""The train step: a chain that ends in an update, as a pure function of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from funczero.comm.collectives import all_gather
from funczero.comm.edge import Edge
from funczero.comm.integers import sum_and_compare
from funczero.core import order, rng, tree
from funczero.core.policy import Policy
from funczero.core.transform import refuse
from funczero.core.types import ChainError, Env, Grad, Metrics, Seed, TrainState, Updated
from funczero.gradients.draws import keyed
from funczero.gradients.loss import check_loss, drew
from funczero.gradients.tape import Tape
from funczero.layout.lazy import Lazy, all_find, lazy
from funczero.layout.mesh import Mesh, P, connect, located, plan_mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Where, apart
from funczero.step.alike import begin
from funczero.step.calls import recorded, watched
from funczero.step.fits import Book, Fits, at, packed
from funczero.step.notices import Early, narrow, nested, say
from funczero.transforms.chain import Source, build, chain, configured
from funczero.transforms.skips import Patience, Skipped, unapplied
from funczero.world.entries import UPDATE

Own = TypeVar("Own")  # what a transform keeps


class Eval(NamedTuple):
    """A loss over all rows given, on all ranks."""

    loss: Tensor  # mean over the weight
    weight: Tensor


class Step(NamedTuple):
    """`state, metrics = step(state, batch)`: same inputs, same bits, and the inputs are left as they were (see
    donate).
    """

    init: Callable[..., TrainState]
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics | None]]
    grad: Grad  # as planned: it prints and checks without any process
    running: Callable[[], Grad]  # the same on the live mesh
    source: Source
    rebuild: Callable[[bool], Step]
    fits: Fits  # which states it takes, and what their views are

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics | None]:
        """One update, or with a streamed chain one micro-batch (metrics None) and, with batch None, the update."""
        return self.update(state, batch)

    @property
    def mesh(self) -> Mesh:
        """The mesh with its count of bytes sent, and this rank's place on it; joins no world.

        Before the world is joined the place is what the launcher's environment says; of a plan for another world there
        is none, and to ask for an index raises.
        """
        return located(self.grad.env.mesh)

    @property
    def live_mesh(self) -> Mesh:
        """The mesh with its process groups, to send over; joins the world."""
        return self.running().env.mesh

    @property
    def policy(self) -> Policy:
        """The dtypes."""
        return self.grad.env.policy

    def local_rows(self, batch: Any) -> Any:
        """This rank's rows of a global batch, dealt in the chain's order of sums, on the mesh's device; None stays
        None.

        Raises:
          ValueError: the rows do not divide by the number of micro-batches.
        """
        mesh = self.live_mesh
        rows = order.deal(batch, self.grad.layout, mesh.index)
        if mesh.device.type == "cpu":
            return rows
        return tree.map(lambda x: None if x is None else x.to(mesh.device, non_blocking=True), rows)

    def view(self, state: TrainState) -> Any:
        """The whole parameters in the compute dtype as fresh leaves that want a gradient, for a forward of your own
        (pullback).
        """
        _usable(state, self.fits)
        slots = self.whole_views(state)
        units = slots.where.structure.units
        leaves = [
            x if x is None else x.detach().requires_grad_(not units[i.unit].frozen)
            for x, i in zip(slots.leaves(), slots.where.structure.leaves, strict=True)
        ]
        return slots.where.structure.unflatten(leaves)

    def views(self, state: TrainState) -> Slots:
        """This rank's part of the parameters at rest in the compute dtype. A collective where the masters were
        replaced.
        """
        return self.fits.views(state)

    def whole_views(self, state: TrainState) -> Slots:
        """The whole parameters in the compute dtype. A collective where they are sharded at rest."""
        return self.running().view(self.views(state), at(state))

    def tape(self, state: TrainState, differentiate: bool = False) -> Tape:
        """What a forward of your own opens parameters with (see layers.py); with differentiate its leaves want a
        gradient.
        """
        return Tape(self.views(state), (), self.running().env, False, differentiate, at(state))

    def state_of(self, state: TrainState, kind: type[Own]) -> Own | None:
        """The state of the first transform of a kind, as step.state_of(state, ScaleLoss); None where the chain has
        none.

        Args:
          kind: the NamedTuple that the transform keeps.
        """
        return next((own for own in state.chain.values() if isinstance(own, kind)), None)

    def with_state(self, state: TrainState, own: Any) -> TrainState:
        """The state with another one of the first transform of own's kind.

        Raises:
          KeyError: the chain has no such transform.
        """
        name = next((name for name, x in state.chain.items() if type(x) is type(own)), None)
        if name is None:
            raise KeyError(
                f"with_state: no transform of this chain keeps a {type(own).__name__}; it has {list(state.chain)}"
            )
        return state._replace(chain={**state.chain, name: own})

    def params(self, state: TrainState) -> Any:
        """The whole masters as the tree given to init; a collective, and a copy."""
        _usable(state, self.fits)
        return recorded("step.params", self._whole, self.running)(state)

    def _whole(self, state: TrainState) -> Any:
        mesh = self.live_mesh
        whole = reduce(lambda x, a: all_gather(x, a, mesh), reversed(state.params.where.axes), state.params)
        return whole.where.structure.unflatten([x if x is None else x.clone() for x in whole.leaves()])

    def specs(self, params: Any) -> dict[str, Any]:
        """The explicit PartitionSpec of every leaf: of `params`, `views`, `grads` and every transform's state, by name.

        Args:
          params: whole parameters, meta tensors do; nothing is allocated.
        """
        meta = _lazy(self.source, self.grad, params, torch.device("meta"))
        state = self.grad.init(meta)
        masters: Slots = state["params"]
        rest = self.grad.env.mesh.coords(self.grad.layout.rest)
        out = {name: tree.map(_spec_tree, own, is_leaf=lambda x: isinstance(x, Slots)) for name, own in state.items()}
        return out | {"grads": _spec_tree(masters), "views": _spec_tree(meta.at(rest, self.grad.env.policy.compute))}

    def abstract(self, params: Any) -> TrainState:
        """The state that init would give as shapes: on the meta device, without memory. A checkpoint is restored into
        this form.

        Args:
          params: whole parameters, meta tensors do.
        """
        g = self.running()
        return _initial(g, _lazy(self.source, g, params, torch.device("meta")), 0)

    def eval(self, loss_fn: Callable[..., Any]) -> Callable[[TrainState, Any], Eval]:
        """A forward of `loss_fn(params, batch) -> (sum, weight)` with the current views: (state, this rank's rows)
        -> Eval.
        """

        def evaluate(state: TrainState, batch: Any) -> Eval:
            g = self.running()
            _usable(state, self.fits)
            tape = self.tape(state)
            with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version counters
                rest = tape.open_rest()
                with nullcontext() if getattr(loss_fn, "keyed", False) else keyed(None, g.env.mesh.device, drew):
                    loss, weight, _ = check_loss(loss_fn(tape.whole.structure.unflatten(rest), batch), has_aux=False)
                tape.left_alone(tape.tensors(rest), None)
                tape.end()
            return _mean_over_ranks(torch.stack([loss.double(), weight.double().to(loss.device)]), g)

        return recorded("step.eval", evaluate, self.running)

    def __str__(self) -> str:
        return describe(self)

    def __repr__(self) -> str:
        return f"<Step {' | '.join(self.grad.names)}>"


def train_step(
    *parts: Any,
    mesh: Mapping[str, int] | DeviceMesh | Mesh | None = None,
    policy: str | Policy | None = None,
    sums: str = "tree",
    prefetch: bool = True,
    debug: bool = False,
    check: int | bool = True,
    patience: int = 20,
) -> Step:
    """A step from a chain: a gradient, transforms, and an optimizer that applies the update.

    Args:
      parts: left to right; see value_and_grad, accumulate, shard, all_reduce, scale_loss, clip_by_global_norm, adamw,
        zero.
      mesh: axis sizes by name, outermost first, -1 for all that are left; or a DeviceMesh. A dict builds, prints and
        plans in any process; the world is joined at the first init. None: all processes on the one axis of the batch.
      policy: dtypes, as "params=float32,compute=bfloat16,accumulate=float32".
      sums: how gradients are added over ranks: in the one "tree" (the same bits on any mesh), or by the "backend" as it
        likes.
      prefetch: start the next block's gather while one computes: one unit more in memory, the same bits.
      debug: log the first non-finite leaf of any update, and its rank.
      check: a thread compares what ranks launch, for ever, where no sum is reached any more: one that differs, left or
        died ends all with a message instead of a hang or an abort of the backend (watch.py). 0: no such thread; ranks
        are still compared in every sum (ledger.py).
      patience: after so many updates in a row that were not finite and were skipped, the next call raises on all ranks;
        those that a dynamic loss scale skips on its way down do not count. The first is said, with leaf and rank, and
        then ever fewer.

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
    if sums not in ("tree", "backend"):
        raise ValueError(
            f"train_step: sums={sums!r} is neither 'tree' nor 'backend'; leave it out for the same bits on any mesh"
        )
    planned = plan_mesh(mesh)
    env = Env(planned, Policy.parse(policy), {a: Edge(a, sums=sums) for a in planned.axes}, prefetch=prefetch)
    return _make(flat, env, Options(debug, check, patience), donated=False, book=Book())


def donate(step: Step) -> Step:
    """The same step with the same bits, in place: the state it is given is used up, and raises when it is used
    again.
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
        return _built(unapplied(parts), env._replace(mesh=running().env.mesh, donate=True))

    def init(params: Any, key: int = 0) -> TrainState:
        g = running()
        own = _lazy(source, g, params, g.env.mesh.device)
        _check_widening(params, g.env.policy)
        begin(params, own.structure, key, g.env.mesh)
        if _speaks(g):
            say(book.said, narrow(params, g.env.policy), nested(params, source.units))
        state = _initial(g, own, key)
        if state.views is not None and packed(g):  # as every later forward will see them
            state = state._replace(views=fits.views(state, made=False))
        book.add(state)
        return state

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics | None]:
        g = running()
        made = _usable(state, fits)
        now, seen = int(state.step), _seen(book, state, patience)
        look = options.debug or seen.row > 0
        run = int(state.key)
        seed = Seed(torch.ones((), device=g.env.mesh.device), rng.fold(run, now), 0, look, (run, now))
        views, given = fits.views(state, made), {**state.chain, "params": state.params}
        if early.open:
            early.before(state.params)
        out, new = g.apply(views, dict(given), batch, seed)
        masters = new.pop("params")
        if out is None:
            return fits.settled(state, views)._replace(chain=new), None
        assert isinstance(out, Updated)
        once_more = lambda: probe().apply(views, given, batch, seed._replace(look=True))[0]
        again = None if g.streams or source.name != "value_and_grad" else once_more
        seen = patience.after(seen, out, now, masters.where.structure.leaves, again)
        if early.open:
            said = early.after(out, masters, batch, g.layout)
            say(book.said, *(said if _speaks(g) else ()))
        wide = None if state.views is None else _renewed(out.params, views)
        fresh = TrainState(masters, wide, new, state.step + 1, state.updates + out.ok, state.key)
        book.add(fresh, seen)
        if donated:
            state.step.fill_(-1 - now)  # the old value says so when it is used again
        return fresh, _metrics(out, fresh)

    fits = Fits(book, running, lambda g, meta: _lazy(source, g, meta, torch.device("meta")))
    rebuild = lambda donating: _make(parts, env, options, donating, book)
    return Step(init, recorded(UPDATE, update, running), planned, running, source, rebuild, fits)


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


def _initial(g: Grad, own: Lazy, key: int) -> TrainState:
    state = g.init(own)
    masters = state.pop("params")
    rest = apart(masters.where, Where(own.structure, g.env.mesh.coords(g.layout.rest)))
    views = None if rest is None else own.at(rest.coords, g.env.policy.compute, rest.place)
    zero = torch.zeros((), dtype=torch.int64)
    return TrainState(masters, views, state, zero, zero.to(own.device, copy=True), torch.tensor(key))


def _lazy(source: Source, g: Grad, params: Any, device: torch.device) -> Lazy:
    own = lazy(params, source.units, g.env.rules, source.frozen, device, source.ties)
    all_find(source.patterns, g.env.rules, own.structure)
    return own


def _check_widening(params: Any, policy: Policy) -> None:
    for path, x in tree.paths(params):
        if torch.finfo(x.dtype).bits > torch.finfo(policy.params).bits:
            have, keep = (str(d).removeprefix("torch.") for d in (x.dtype, policy.params))
            raise TypeError(
                f"init: parameter {path!r} is {have}, but the policy keeps masters in {keep}; write policy='{have}', or"
                " cast the parameters first"
            )


def _renewed(new: Slots, old: Slots) -> Slots:
    """New views; frozen leaves were not sent and stay."""
    new = new.to(old.buffers[0].dtype).placed(old.where.place, old.buffers[0].device)
    return Slots(
        tuple(
            o if u.frozen else n for n, o, u in zip(new.buffers, old.buffers, old.where.structure.units, strict=True)
        ),
        old.where,
    )


def _usable(state: Any, fits: Fits) -> bool:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"step: its first argument is a TrainState from step.init(params), but this is a {type(state).__name__}"
        )
    if int(state.step) < 0:
        raise RuntimeError(
            f"step: this state was donated at step {-1 - int(state.step)} and its memory is in use; go on with the"
            " state that step(...) returned, or leave fz.donate out"
        )
    return fits.look(state)


def _metrics(out: Updated, state: TrainState) -> Metrics:
    device = out.loss.device
    norm = out.logs.get("grad_norm", out.norm)
    scale = out.logs.get("scale", torch.ones((), dtype=torch.float64, device=device))
    lr = out.logs.get("lr", torch.full((), float("nan"), dtype=torch.float64, device=device))
    return Metrics(out.loss, out.weight, norm, out.ok, out.weight == 0, scale, lr, state.updates, out.aux)


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


def _mean_over_ranks(sums: Tensor, g: Grad) -> Eval:
    axes = g.layout.batch
    index, size = g.env.mesh.rank(axes)
    bits = torch.zeros(size, 2, dtype=torch.int64, device=sums.device)
    bits[index] = sums.view(torch.int64)
    total, _ = sum_and_compare([bits.view(-1)], axes, g.env.mesh)
    loss, weight = order.tree_sum(total.view(torch.float64).view(size, 2))
    return Eval(loss / weight, weight)


def _spec_tree(x: Any) -> Any:
    if not isinstance(x, Slots):
        return P()
    return x.where.structure.unflatten([x.where.spec(i) for i in range(len(x.where.structure.leaves))])


def describe(step: Step) -> str:
    """The chain with the layout at every arrow, and what it cannot promise."""
    g = step.grad
    depth, lines = 0, []
    for name, layout in zip(g.names, g.arrows, strict=True):
        depth -= name == ")"
        lines.append(
            (f"{'  ' * depth}{name}", "" if name.startswith("shard(") and layout.batch == () else layout.describe())
        )
        depth += name.startswith("shard(")
    wide = max(len(a) for a, _ in lines)
    notes = []
    if g.layout.rest and not step.source.units:
        notes.append(
            "parameters are gathered whole in every forward; name their blocks with value_and_grad(...,"
            " units=('blocks',)) to hold two at a time"
        )
    odd = {a: n for a, n in g.layout.order if n & (n - 1)}
    if odd:
        more = ", and in other orders of these sums (stages 2 and 3 against 0 and 1)" if len(g.layout.order) > 1 else ""
        notes.append(
            f"{odd} is no power of two: the same bits at every run of this world, other bits in other worlds{more}"
        )
    edges = g.env.edges.values()
    if any(e.sums == "backend" for e in edges):
        notes.append("gradients are added over ranks by the backend: the same-bits promise is off")
    notes += [_packs(e, g.env.mesh.axes[e.axis].size) for e in edges if not e.exact]
    head = f"train_step on {g.env.mesh} ({g.env.mesh.device.type}), {g.env.policy}{', donated' if g.env.donate else ''}"
    return "\n".join(
        [head, *(f"  {a:<{wide}}  -> {b}" if b else f"  {a}" for a, b in lines), *(f"  note: {n}" for n in notes)]
    )


def _packs(edge: Edge, size: int) -> str:
    """What a wire means for the values."""
    if size == 1:
        return f"nothing travels over {edge.axis!r}, whose size is 1, so {edge} packs nothing there"
    return (
        f"what travels over {edge.axis!r} is packed ({edge}): all ranks read the same, and other bits than those of the"
        " chain without wires"
    )


__all__ = ["ChainError", "Eval", "Step", "describe", "donate", "train_step"]

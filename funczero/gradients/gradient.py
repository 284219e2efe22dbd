"""Where gradients come from: `value_and_grad` of a loss, `pullback` of somebody else's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from funczero.comm.collectives import all_gather
from funczero.comm.wire import Key
from funczero.core import order, tree
from funczero.core.number import flag
from funczero.core.rows import counting
from funczero.core.types import Apply, ChainError, Env, Grad, Layout, Seed, State, Sum
from funczero.gradients.arrivals import sparse
from funczero.gradients.call import LossCall, Outcome, synced
from funczero.gradients.higher import Loss, applied
from funczero.gradients.loss import no_gradient, reentrant
from funczero.gradients.synced import Across
from funczero.gradients.tape import Tape
from funczero.gradients.units import conditional_of
from funczero.layout.lazy import Lazy
from funczero.layout.slots import Slots
from funczero.layout.spec import P, of_batch
from funczero.transforms import feedback
from funczero.transforms.chain import Configure, Source, opening
from funczero.transforms.feedback import remembers
from funczero.transforms.model_state import Rule, model_of
from funczero.transforms.outputs import Rules, rules_of


def value_and_grad(
    loss_fn: Callable[..., Any],
    batch: Any = P(),
    units: Sequence[str] | None = None,
    trainable: str | Callable[[str], bool] | None = None,
    has_aux: bool | Rules = False,
    rng: bool = False,
    replicated: Sequence[str] = (),
    higher_order: bool = False,
    state: Any = None,
    rules: Sequence[tuple[str, Rule]] = (),
    unused: str = "zeros",
    conditional: Sequence[str] | None = None,
) -> Source:
    """The loss and its gradient, as sums over the examples: a Source, at the left end of a chain.

    Layout out: unreduced over the axes of `batch`, less those of brackets that open left of it.

    Args:
      loss_fn: pure; (params, batch) -> (sum of losses, sum of weights), both 0-d; a mean is never taken here.
      batch: P("data") or P(("node", "local")): the mesh axes that dim 0 of every tensor of the batch is split over.
        Or a prefix tree of the batch, as {"x": P("data"), "tokens": P(None, "data"), "table": P()}: rows in dim 1, as
        time-major sequences have them, and what has no rows (a graph, another network's parameters, a table): whole on
        every rank, which is compared in the first updates, and in every micro-batch. Numbers, text, None and tensors
        without dims are whole anyway. Mappings and dataclasses are opened like dicts. Under one P() for all, rows in
        dim 0 are split by accumulate alone.
      units: paths of lists of like subtrees, which the loss gets closed and opens by fz.layers or fz.gather: gathered
        and scattered one by one where parameters are sharded. By default what the loss function names (fz.stateless),
        else none.
      trainable: regex or predicate on paths; the other leaves have no gradient, no moments and are not reduced.
      has_aux: the loss returns (sum, weight, aux); aux is a tree of 0-d sums, summed in the gradients' order. Tensors
        need a rule: has_aux=[(regex, rule), ...], by path, of which the first counts: "sum" adds them, "rows" joins
        those of this rank's micro-batches, "cat" those of all, in the order of the global batch.
      rng: call loss_fn(params, batch, key) with a key folded from (state.step, global micro-batch index).
      replicated: mesh axes that the batch is not split over, on purpose: ranks along them are given the same rows,
        which is compared.
      higher_order: the loss takes derivatives of its own through units: a gradient penalty, a Hessian-vector product,
        a jvp. A unit then runs up to four times, attention as plain operations, so that the last bits may be
        others. Wires of this gradient's brackets are refused, for they have no derivative.
      state: the first values of the model's own state, a tree of tensors, as running statistics or a hidden state. The
        loss is called as loss_fn(params, model_state, batch) and returns (sum, weight, model_state). Every micro-batch
        reads what the last update left; k of them move it once. It is `state.model_state`, whole on every rank. By
        default what the loss function names (fz.stateless), else none.
      rules: (regex, rule) of leaves of that state, of which the first counts: how the values that micro-batches return
        become one. "mean" by weight (floats, by default); whatever they weigh "sum" of changes, and "first" of the
        first micro-batch (others, by default); "rows" in dim 0, where each row of the batch has one of its own and
        reads that alone; or a function (values [micro-batches, ...], weights, old) -> new.
      conditional: of `units`, the lists whose blocks a rank may leave out, or run in another order, where others do not
        (routed experts, dropped layers): ranks then agree on every unit before it is gathered. By default what the loss
        function names (fz.stateless), and lists that are called experts.
      unused: what the optimizer makes of a leaf that no micro-batch on any rank has used: "zeros" is a gradient of
        zeros, under which moments and weights decay; "keep" leaves its parameter and moments as they are, as torch
        does where a grad is None. Counts of updates go on, where torch's, one a leaf, do not.

    Raises:
      ChainError: the batch's spec splits a leaf in two dims, or two leaves over different axes; conditional names no
        unit, or meets higher_order.
      TypeError, ValueError: a rule of the state means nothing, or cannot be that leaf's.
    """
    units = tuple(getattr(loss_fn, "units", ()) if units is None else (units,) if isinstance(units, str) else units)
    if higher_order and conditional:
        why = "where every derivative gathers again, ranks must open the same units in the same order"
        raise ChainError(
            f"value_and_grad: conditional={conditional!r} is written with higher_order, but {why}; leave out one"
        )
    if unused not in ("zeros", "keep"):
        raise ValueError(f"value_and_grad: unused={unused!r} is neither 'zeros' nor 'keep'; write one of them")
    if higher_order and unused == "keep":
        why = "higher_order gives every leaf of a message a gradient, so that nobody knows which were used"
        raise ChainError(f"value_and_grad: unused='keep' is written, but {why}; leave out one of them")
    if conditional is None and hasattr(loss_fn, "conditional"):
        conditional = [u for u in units if u in loss_fn.conditional]
    conditional = () if higher_order else conditional_of("value_and_grad", units, conditional)
    matches = tree.matcher(trainable)
    frozen = (lambda path: False) if trainable is None else (lambda path: not matches(path))

    values = getattr(loss_fn, "state", None) if state is None else state
    model = None if values is None else model_of(values, (*rules, *getattr(loss_fn, "rules", ())))
    if model is None and rules:
        raise ValueError("value_and_grad: there are rules, but no model state; write state=..., or leave them out")

    def make(source: Source, env: Env) -> Grad:
        layout, env = _layout(source, env), env._replace(model=model, keeps=unused == "keep")
        call = LossCall(loss_fn, rules_of(has_aux), rng, model, Across(env.mesh, source.batch))
        if flag("value_and_grad", "higher_order", higher_order) or env.differentiable:
            loss = Loss(call, env, source.batch)
            return _grad(source, env, layout, applied(source, loss, order.indices(layout, env.mesh.index)[0]))
        return _grad(source, env, layout, _on_tape(source, env, layout, partial(_differentiate, call)))

    axes, cut = of_batch(batch)
    loss_fn = counting(loss_fn, cut)
    ties, patterns = tuple(getattr(loss_fn, "ties", {}).items()), _patterns("value_and_grad(trainable=...)", trainable)
    return Source(
        "value_and_grad",
        make,
        axes,
        units,
        frozen,
        ties=ties,
        patterns=patterns,
        replicated=_names(replicated),
        synced=synced(loss_fn),
        conditional=conditional,
        cut=cut,
        spec=None if cut == 0 else batch,
    )


def pullback(
    batch: P = P(), trainable: str | Callable[[str], bool] | None = None, replicated: Sequence[str] = ()
) -> Source:
    """A gradient whose forward ran elsewhere: its batch is `(pull, loss, weight)` with `pull: cotangent -> gradients`.

    `pull` is the vector-Jacobian product of the caller's loss at `step.view(state)`, as the tree of those leaves (see
    fz.pull); scaling, brackets, clipping and optimizers do not know the difference.

    Layout out: as value_and_grad.
    """
    matches = tree.matcher(trainable)
    frozen = (lambda path: False) if trainable is None else (lambda path: not matches(path))

    def pulled(whole: list[Tensor], micro: Any, seed: Seed, state: State, tape: Tape) -> tuple[Outcome, list[Any]]:
        if not isinstance(micro, tuple) or len(micro) != 3 or not callable(micro[0]):
            raise TypeError(
                f"pullback: its batch is (pull, loss, weight), but this is a {type(micro).__name__}; write step(state,"
                " (fz.pull(loss, views), loss, weight))"
            )
        pull, loss, weight = micro
        loss, weight = (torch.as_tensor(x, device=tape.port.device).detach() for x in (loss, weight))
        structure = tape.whole.structure
        flat = structure.treedef.flatten_up_to(pull(seed.cotangent.to(loss.dtype)))
        grads: list[Any] = [None] * len(structure.leaves)
        for place, g in zip(structure.places, flat, strict=True):
            if g is not None:
                grads[place] = g if grads[place] is None or g is grads[place] else grads[place] + g
        return Outcome(loss, weight, None, ()), [None if structure.frozen(i) else g for i, g in enumerate(grads)]

    patterns = _patterns("pullback(trainable=...)", trainable)

    def make(source: Source, env: Env) -> Grad:
        if env.differentiable:
            why = "its forward ran elsewhere, where a derivative of the step does not reach"
            raise ChainError(f"pullback: {why}; write value_and_grad(loss_fn, ...) for a differentiable step")
        layout = _layout(source, env)
        return _grad(source, env, layout, _on_tape(source, env, layout, pulled, forward=False))

    axes, cut = of_batch(batch)
    if cut != 0:
        why = "its rows were read by a forward elsewhere, and nothing of them is dealt or cut here"
        raise ChainError(f"pullback: batch={batch}, but {why}; write the axes alone: batch={P(axes)}")
    return Source("pullback", make, axes, (), frozen, patterns=patterns, replicated=_names(replicated))


def _names(axes: str | Sequence[str]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def pull(loss: Tensor, views: Any) -> Callable[[Tensor], Any]:
    """The vector-Jacobian product of a loss at the leaves that its forward used, for `pullback`."""
    flat, treedef = tree.flatten(views)

    def vjp(cotangent: Tensor) -> Any:
        unique = {id(x): x for x in flat if isinstance(x, Tensor) and x.requires_grad}
        grads = dict(
            zip(unique, torch.autograd.grad(loss, list(unique.values()), cotangent, allow_unused=True), strict=True)
        )
        return tree.unflatten([grads.get(id(x)) for x in flat], treedef)

    return vjp


def freeze(which: str | Callable[[str], bool]) -> Configure:
    """Leaves whose path matches have no gradient, no moments and no bytes on the wire for one, wherever this stands in
    the chain.

    Args:
      which: a regex searched in the path, or a predicate on it.
    """
    matches = tree.matcher(which)
    name = f"freeze({which!r})"
    more = _patterns(name, which)
    return Configure(
        name, lambda s: s._replace(frozen=lambda path: s.frozen(path) or matches(path), patterns=s.patterns + more)
    )


def _patterns(who: str, which: Any) -> tuple[tuple[str, str], ...]:
    return ((who, which),) if isinstance(which, str) else ()


def _refuse_axes(source: Source, axes: tuple[str, ...]) -> None:
    """Every bracket cuts an axis of the batch, once."""
    for a in axes:
        if a not in source.batch:
            raise ChainError(
                f"shard({a!r}): the gradient is not a partial sum over {a!r}, because the batch is not split over it;"
                f" write {source.name}(..., batch=P({a!r}))\n  {''.join(f'{x}[ ' for x in source.axes)}{source.name} "
                " <- here"
            )
    if len(set(axes)) < len(axes):
        raise ChainError(
            f"shard({axes[-1]!r}): {axes[-1]!r} is bracketed twice; a mesh axis is cut once\n "
            f" {''.join(f'{x}[ ' for x in source.axes)}{source.name}  <- here"
        )


def _layout(source: Source, env: Env) -> Layout:
    """Of what a Source returns."""
    axes = (*source.axes, *source.scatter)
    _refuse_axes(source, axes)
    sizes = tuple((a, env.mesh.axes[a].size) for a in axes)
    return Layout(source.batch, frozenset(source.batch) - set(axes), axes, source.axes, sizes, cut=source.cut)


def _on_tape(
    source: Source, env: Env, layout: Layout, differentiate: Callable[..., Any], forward: bool = True
) -> Apply:
    """A first-order gradient: units are opened and scattered one by one."""
    axes = layout.sharded

    def apply(views: Slots, state: dict[str, Any], batch: Any, seed: Seed) -> tuple[Sum, dict[str, Any]]:
        mine = seed._replace(index=seed.index + order.indices(layout, env.mesh.index)[0])
        held = feedback.of_axes(state, axes, seed)
        key, conditional = (seed.key, seed.index), bool(source.conditional)
        tape = Tape(views, source.scatter, env, seed.look, True, seed.at, key, held, conditional)
        whole = tape.open_rest(forward)
        found, grads = differentiate(whole, batch, mine, state, tape)
        slots, bad = close(tape, grads)
        for a in held:
            state = feedback.renewed(state, env.edges[a], tape.arrivals.memory(a))
        found, used = found.detached(), None
        if env.keeps:
            used = torch.zeros(len(views.where.structure.leaves), dtype=torch.int64, device=env.mesh.device)
            used[sorted(tape.arrivals.used)] = 1
        return Sum(found.loss[None], found.weight[None], found.aux, slots, bad, found.moved, used), state

    return apply


def _grad(source: Source, env: Env, layout: Layout, apply: Apply) -> Grad:
    """A Source's gradient, with the chain's names and the memories of its wires."""
    axes, mesh = layout.sharded, env.mesh

    def view(views: Slots, at: Key = (0,)) -> Slots:
        return reduce(lambda x, a: all_gather(x, env.edges[a], mesh, at), reversed(source.axes), views)

    def init(params: Lazy) -> dict[str, Any]:
        left = lambda i: [a for a in source.batch if a not in axes[:i]]
        at = [feedback.empty(params, env, a, axes[:i], left(i)) for i, a in enumerate(axes) if remembers(env, a)]
        own = {} if env.model is None else env.model.init(params.device)
        return own | {name: own for state in at for name, own in state.items()}

    said = f"(batch={P(source.batch if len(source.batch) > 1 else source.batch[0])})" if source.batch else ""
    if source.spec is not None:
        said = f"(batch={source.spec})"
    opened = tuple(opening(env.edges[a]) for a in source.axes)
    arrows = (*[Layout()] * len(opened), layout)
    return Grad(init, view, apply, layout, (*opened, source.name + said), env, arrows)


def _differentiate(
    call: LossCall, whole: list[Any], batch: Any, seed: Seed, state: State, tape: Tape
) -> tuple[Outcome, list[Any]]:
    structure = tape.whole.structure
    open_leaves = tape.tensors(whole)
    before = tape.copies(open_leaves)
    outcome = call(structure.unflatten(whole), batch, seed, state, tape.port.device)
    loss = outcome.loss
    tape.left_alone(open_leaves, before)
    wanted = {i: x for i, x in open_leaves.items() if x.requires_grad}
    grads: list[Any] = [None] * len(structure.leaves)
    if loss.requires_grad:
        void = call.void(outcome)
        with tape.collecting(seed.look, void=void):
            try:
                found = torch.autograd.grad(
                    loss, [*wanted.values(), tape.port], seed.cotangent.to(loss.dtype), allow_unused=True
                )
            except RuntimeError as error:
                if "not implemented for sparse" in str(error):
                    raise TypeError(sparse()) from None
                if "When use_reentrant=True" in str(error):
                    raise TypeError(reentrant()) from None
                raise
        for i, g in zip(wanted, found, strict=False):
            if g is not None and g.layout != torch.strided:
                raise TypeError(sparse(structure.leaves[i].path))
            grads[i] = None if void else g
    learning = any(not u.frozen and members for u, members in zip(structure.units, structure.members, strict=True))
    nothing = learning and not tape.arrivals.number and all(g is None for g in grads)
    if nothing and not tape.conditional and bool(outcome.weight != 0):  # else its rows may be those that train nothing
        raise RuntimeError(no_gradient())
    return outcome, grads


def close(tape: Tape, grads: list[Any]) -> tuple[Slots, Tensor | None]:
    """Leaf gradients and the tape's units as Slots; what lies outside the units is scattered here, where it must be."""
    structure, where, device = tape.whole.structure, tape.whole, tape.port.device
    tape.end()
    tape.arrivals.used.update(i for i, g in enumerate(grads) if g is not None)
    if tape.env.early is not None and tape.env.early.used is not None:
        tape.env.early.used.update(tape.arrivals.used)
    if not tape.seam:
        bad = None
        if tape.look:
            zero = torch.zeros((), dtype=torch.int64, device=device)
            bad = torch.stack([zero if g is None else (~g.isfinite()).sum() for g in grads])
        return Slots(Slots.pack(where, grads, tape.dtype, device).buffers, tape.arrivals.here), bad
    loose = [u for u, unit in enumerate(structure.units) if not unit.seam and not unit.frozen and structure.members[u]]
    return tape.arrivals.close({u: [grads[i] for i in structure.members[u]] for u in loose})

"""Where gradients come from: `value_and_grad` of a loss, `pullback` of somebody else's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from funczero.comm.collectives import all_gather
from funczero.comm.wire import Key
from funczero.core import order, rng, tree
from funczero.core.number import flag
from funczero.core.types import Apply, ChainError, Env, Grad, Layout, Seed, Sum
from funczero.gradients import draws
from funczero.gradients.arrivals import sparse
from funczero.gradients.higher import Loss, applied
from funczero.gradients.loss import aux_sum, check_loss, drew, is_void, no_gradient, reentrant
from funczero.gradients.tape import Tape
from funczero.gradients.units import conditional_of
from funczero.layout.lazy import Lazy
from funczero.layout.slots import Slots
from funczero.layout.spec import P
from funczero.transforms import feedback
from funczero.transforms.chain import Configure, Source, opening
from funczero.transforms.feedback import remembers


def value_and_grad(
    loss_fn: Callable[..., Any],
    batch: P = P(),
    units: Sequence[str] | None = None,
    trainable: str | Callable[[str], bool] | None = None,
    has_aux: bool = False,
    rng: bool = False,
    replicated: Sequence[str] = (),
    higher_order: bool = False,
    conditional: Sequence[str] | None = None,
) -> Source:
    """The loss and its gradient, as sums over the examples: a Source, at the left end of a chain.

    Layout out: unreduced over the axes of `batch`, less those of brackets that open left of it.

    Args:
      loss_fn: pure; (params, batch) -> (sum of losses, sum of weights), both 0-d; a mean is never taken here.
      batch: P("data") or P(("node", "local")): the mesh axes that dim 0 of every tensor of the batch is split over.
      units: paths of lists of like subtrees, which the loss gets closed and opens by fz.layers or fz.gather: gathered
        and scattered one by one where parameters are sharded. By default what the loss function names (fz.stateless),
        else none.
      trainable: regex or predicate on paths; the other leaves have no gradient, no moments and are not reduced.
      has_aux: the loss returns (sum, weight, aux); aux is a tree of 0-d sums, summed in the gradients' order.
      rng: call loss_fn(params, batch, key) with a key folded from (state.step, global micro-batch index).
      replicated: mesh axes that the batch is not split over, on purpose: ranks along them are given the same rows,
        which is compared.
      higher_order: the loss takes derivatives of its own through units: a gradient penalty, a Hessian-vector product,
        a jvp. A unit then runs up to four times, attention as plain operations, so that the last bits may be
        others. Wires of this gradient's brackets are refused, for they have no derivative.
      conditional: of `units`, the lists whose blocks a rank may leave out, or run in another order, where others do not
        (routed experts, dropped layers): ranks then agree on every unit before it is gathered. By default what the loss
        function names (fz.stateless), and lists that are called experts.

    Raises:
      ChainError: the batch's spec splits another dim than 0; conditional names no unit, or meets higher_order.
    """
    units = tuple(getattr(loss_fn, "units", ()) if units is None else (units,) if isinstance(units, str) else units)
    if higher_order and conditional:
        why = "where every derivative gathers again, ranks must open the same units in the same order"
        raise ChainError(
            f"value_and_grad: conditional={conditional!r} is written with higher_order, but {why}; leave out one"
        )
    if conditional is None and hasattr(loss_fn, "conditional"):
        conditional = [u for u in units if u in loss_fn.conditional]
    conditional = () if higher_order else conditional_of("value_and_grad", units, conditional)
    matches = tree.matcher(trainable)
    frozen = (lambda path: False) if trainable is None else (lambda path: not matches(path))

    def make(source: Source, env: Env) -> Grad:
        layout = _layout(source, env)
        if flag("value_and_grad", "higher_order", higher_order) or env.differentiable:
            loss = Loss(loss_fn, has_aux, rng, env, source.batch)
            return _grad(source, env, layout, applied(source, loss, order.indices(layout, env.mesh.index)[0]))
        differentiate = lambda views, micro, seed, tape: _differentiate(loss_fn, views, micro, seed, tape, has_aux, rng)
        return _grad(source, env, layout, _on_tape(source, env, layout, differentiate))

    ties, patterns = tuple(getattr(loss_fn, "ties", {}).items()), _patterns("value_and_grad(trainable=...)", trainable)
    return Source(
        "value_and_grad",
        make,
        _batch_axes(batch),
        units,
        frozen,
        ties=ties,
        patterns=patterns,
        replicated=_names(replicated),
        conditional=conditional,
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

    def pulled(whole: list[Tensor], micro: Any, seed: Seed, tape: Tape) -> tuple[Tensor, Tensor, Any, list[Any]]:
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
        return loss, weight, None, [None if structure.frozen(i) else g for i, g in enumerate(grads)]

    patterns = _patterns("pullback(trainable=...)", trainable)

    def make(source: Source, env: Env) -> Grad:
        if env.differentiable:
            why = "its forward ran elsewhere, where a derivative of the step does not reach"
            raise ChainError(f"pullback: {why}; write value_and_grad(loss_fn, ...) for a differentiable step")
        layout = _layout(source, env)
        return _grad(source, env, layout, _on_tape(source, env, layout, pulled, forward=False))

    return Source("pullback", make, _batch_axes(batch), (), frozen, patterns=patterns, replicated=_names(replicated))


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


def _batch_axes(batch: P) -> tuple[str, ...]:
    spec = batch if isinstance(batch, P) else P(batch)
    if any(d != 0 for _, d in spec.axes()):
        raise ChainError(
            f"value_and_grad: batch={spec} splits a dim other than 0, but a batch is split by rows; write"
            f" P(({', '.join(repr(a) for a, _ in spec.axes())},))"
        )
    return tuple(a for a, _ in spec.axes())


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
    return Layout(source.batch, frozenset(source.batch) - set(axes), axes, source.axes, sizes)


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
        loss, weight, aux, grads = differentiate(whole, batch, mine, tape)
        slots, bad = close(tape, grads)
        for a in held:
            state = feedback.renewed(state, env.edges[a], tape.arrivals.memory(a))
        return Sum(loss.detach()[None], weight.detach()[None], aux, slots, bad=bad), state

    return apply


def _grad(source: Source, env: Env, layout: Layout, apply: Apply) -> Grad:
    """A Source's gradient, with the chain's names and the memories of its wires."""
    axes, mesh = layout.sharded, env.mesh

    def view(views: Slots, at: Key = (0,)) -> Slots:
        return reduce(lambda x, a: all_gather(x, env.edges[a], mesh, at), reversed(source.axes), views)

    def init(params: Lazy) -> dict[str, Any]:
        left = lambda i: [a for a in source.batch if a not in axes[:i]]
        at = [feedback.empty(params, env, a, axes[:i], left(i)) for i, a in enumerate(axes) if remembers(env, a)]
        return {name: own for state in at for name, own in state.items()}

    rows = f"(batch={P(source.batch if len(source.batch) > 1 else source.batch[0])})" if source.batch else ""
    opened = tuple(opening(env.edges[a]) for a in source.axes)
    arrows = (*[Layout()] * len(opened), layout)
    return Grad(init, view, apply, layout, (*opened, source.name + rows), env, arrows)


def _differentiate(
    loss_fn: Callable[..., Any], whole: list[Any], batch: Any, seed: Seed, tape: Tape, has_aux: bool, keyed: bool
) -> tuple[Tensor, Tensor, Any, list[Any]]:
    structure = tape.whole.structure
    key = (rng.fold(seed.key, seed.index),) if keyed else ()
    open_leaves = tape.tensors(whole)
    before = tape.copies(open_leaves)
    with (
        nullcontext()
        if getattr(loss_fn, "keyed", False)
        else draws.keyed(next(iter(key), None), tape.port.device, drew)
    ):
        loss, weight, aux = check_loss(loss_fn(structure.unflatten(whole), batch, *key), has_aux)
    tape.left_alone(open_leaves, before)
    wanted = {i: x for i, x in open_leaves.items() if x.requires_grad}
    grads: list[Any] = [None] * len(structure.leaves)
    if loss.requires_grad:
        void = is_void(loss_fn, weight)
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
    if nothing and not tape.conditional and bool(weight != 0):  # else its rows may be those that train nothing
        raise RuntimeError(no_gradient())
    rows = None
    if has_aux:
        flat, spec = tree.flatten(aux)
        rows = (torch.stack([aux_sum(path, x, loss.device).detach() for path, x in tree.paths(aux)])[None], spec)
    return loss, weight.to(loss.device), rows, grads


def close(tape: Tape, grads: list[Any]) -> tuple[Slots, Tensor | None]:
    """Leaf gradients and the tape's units as Slots; what lies outside the units is scattered here, where it must be."""
    structure, where, device = tape.whole.structure, tape.whole, tape.port.device
    tape.end()
    if tape.env.early is not None and tape.env.early.used is not None:
        tape.env.early.used.update(i for i, g in enumerate(grads) if g is not None)
    if not tape.seam:
        bad = None
        if tape.look:
            zero = torch.zeros((), dtype=torch.int64, device=device)
            bad = torch.stack([zero if g is None else (~g.isfinite()).sum() for g in grads])
        return Slots(Slots.pack(where, grads, tape.dtype, device).buffers, tape.arrivals.here), bad
    loose = [u for u, unit in enumerate(structure.units) if not unit.seam and not unit.frozen and structure.members[u]]
    return tape.arrivals.close({u: [grads[i] for i in structure.members[u]] for u in loose})

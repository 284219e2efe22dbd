"""Where gradients come from: `value_and_grad` of a loss; and which leaves have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from funczero.core import order, tree
from funczero.core.exhausted import asking
from funczero.core.number import flag
from funczero.core.rows import counting
from funczero.core.spans import span
from funczero.core.types import ChainError, Env, Grad, Seed, State
from funczero.gradients.arrivals import sparse
from funczero.gradients.call import LossCall, Outcome, synced
from funczero.gradients.higher import Loss, applied
from funczero.gradients.loss import no_gradient, reentrant
from funczero.gradients.source import gradient_of, layout_of, names_of, on_tape, patterns_of
from funczero.gradients.synced import Across
from funczero.gradients.tape import Tape
from funczero.gradients.units import conditional_of
from funczero.layout.spec import P, of_batch
from funczero.transforms.chain import Configure, Source
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
        layout, env = layout_of(source, env), env._replace(model=model, keeps=unused == "keep")
        call = LossCall(loss_fn, rules_of(has_aux), rng, model, Across(env.mesh, source.batch))
        if flag("value_and_grad", "higher_order", higher_order) or env.differentiable:
            loss = Loss(call, env, source.batch)
            return gradient_of(source, env, layout, applied(source, loss, order.indices(layout, env.mesh.index)[0]))
        differentiate = partial(_differentiate, call)
        if env.capture is not None:
            differentiate = partial(env.capture.differentiate, call, differentiate)
        return gradient_of(source, env, layout, on_tape(source, env, layout, differentiate))

    axes, cut = of_batch(batch)
    loss_fn = counting(loss_fn, cut)
    ties, patterns = tuple(getattr(loss_fn, "ties", {}).items()), patterns_of(
        "value_and_grad(trainable=...)", trainable
    )
    return Source(
        "value_and_grad",
        make,
        axes,
        units,
        frozen,
        ties=ties,
        patterns=patterns,
        replicated=names_of(replicated),
        synced=synced(loss_fn),
        conditional=conditional,
        cut=cut,
        spec=None if cut == 0 else batch,
        beside=_beside(has_aux=has_aux, higher_order=higher_order, state=model, unused=unused == "keep"),
    )


def _beside(**said: Any) -> tuple[str, ...]:
    """The names of those arguments that are written."""
    return tuple(name for name, value in said.items() if value is not None and value is not False)


def freeze(which: str | Callable[[str], bool]) -> Configure:
    """Leaves whose path matches have no gradient, no moments and no bytes on the wire for one, wherever this stands in
    the chain.

    Args:
      which: a regex searched in the path, or a predicate on it.
    """
    matches = tree.matcher(which)
    name = f"freeze({which!r})"
    more = patterns_of(name, which)
    return Configure(
        name, lambda s: s._replace(frozen=lambda path: s.frozen(path) or matches(path), patterns=s.patterns + more)
    )


def _differentiate(
    call: LossCall, whole: list[Any], batch: Any, seed: Seed, state: State, tape: Tape
) -> tuple[Outcome, list[Any]]:
    structure = tape.whole.structure
    open_leaves = tape.tensors(whole)
    before = tape.copies(open_leaves)
    with span("forward"), asking(lambda: "in the forward, outside the units"):
        outcome = call(structure.unflatten(whole), batch, seed, state, tape.port.device)
    loss, void = outcome.loss, call.void(outcome, seed)
    tape.left_alone(open_leaves, before)
    wanted = {i: x for i, x in open_leaves.items() if x.requires_grad}
    grads: list[Any] = [None] * len(structure.leaves)
    if loss.requires_grad:
        with span("backward"), tape.collecting(seed.look, void=void):
            try:
                with asking(tape.arrivals.amid):
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
    if (
        nothing and not void and not tape.conditional and bool(outcome.weight != 0)
    ):  # else its rows may be those that train nothing
        raise RuntimeError(no_gradient())
    return outcome, grads

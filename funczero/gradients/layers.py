"""The seam: where a loss opens one unit of parameters after another, so that ZeRO-3 holds two units and never the
model.

A unit is gathered just before it runs, dropped after it, gathered again in the backward, and its gradient is scattered
as soon as it exists: the next gather and the last scatter travel while a block computes. Program order is the schedule.
Three forms: *keep* (saved tensors that live in the gathered buffer are swapped for their coordinates), *remat* (only
the block's inputs are saved), and for higher derivatives a block as a function of this rank's parts (parts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.core import rng, tree
from funczero.core.held import differentiated, held_by
from funczero.gradients.arrivals import Group
from funczero.gradients.keep import run_unit
from funczero.gradients.node import node
from funczero.gradients.parts import Parts
from funczero.gradients.recording import Recording
from funczero.gradients.ref import Ref
from funczero.gradients.remat import Rerun, rerun_resting


def layers(
    block: Callable[..., Any], blocks: Sequence[Any], x: Any, *shared: Any, key: int | None = None, remat: bool = False
) -> Any:
    """x through every block in turn: `x = block(params, x, *shared)`, a plain loop with the next gather in flight.

    The values are those of the plain loop, at every stage. `blocks` is a list of like trees, open or closed (units).

    >>> layers(lambda p, x: x * p["w"], [{"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)}], torch.tensor(1.0)).item()
    6.0

    Args:
      block: pure; gets one block's parameters, x, shared and, if key is given, key=(its own). May return (x, aux): then
        the result is (x, [aux, ...]). It must not capture tensors that need a gradient: hand them in through `shared`.
      remat: save only each block's inputs and run it again in the backward.

    Raises:
      TypeError: block captures a tensor that needs a gradient.
    """
    auxes = []
    opened = [tree.flatten(b) for b in blocks]
    groups = [group_of(refs) for refs, _ in opened]
    again = any(isinstance(r, Ref) and isinstance(r.tape, Parts) for refs, _ in opened for r in refs[:1])
    _no_captures(block, any(groups), again)
    for i, params in enumerate(opened):
        kwargs = {} if key is None else {"key": rng.fold(key, i)}
        guess = groups[i + 1] if i + 1 < len(groups) else ()
        x = run_block(block, params, groups[i], (x, *shared), kwargs, guess, remat)
        if isinstance(x, tuple):
            x, aux = x
            auxes.append(aux)
    return (x, auxes) if auxes else x


def gather(params: Any) -> Any:
    """Closed parameters, open and whole, for as long as you hold them; their gradients are scattered like a block's."""
    flat, treedef = tree.flatten(params)
    refs = [r for r in flat if isinstance(r, Ref)]
    if not refs:
        return params
    tape, units = refs[0].tape, tuple(dict.fromkeys(r.unit for r in refs))
    if isinstance(tape, (Parts, Recording)):
        leaves = tape.gathered(units)
        return tree.unflatten([leaves[r.leaf] if isinstance(r, Ref) else r for r in flat], treedef)
    if tape.seam:
        leaves = tape.open_leaves(tape.enter(units)[0], track=torch.is_grad_enabled() and tape.differentiate)
    else:
        leaves = tape.resting_leaves(units)
    tape.lend(leaves)
    return tree.unflatten([leaves[r.leaf] if isinstance(r, Ref) else r for r in flat], treedef)


def group_of(leaves: list[Any]) -> Group:
    """The units that one block's closed parameters lie in."""
    groups = groups_of(leaves)
    if len(groups) > 1:
        why = "one block holds parameters of a step and of what lies beside it (fz.frozen)"
        raise TypeError(f"fz.layers: {why}; open those with fz.gather, or write the model as a module (fz.beside)")
    return next(iter(groups.values()), ())


def groups_of(leaves: list[Any]) -> dict[Any, Group]:
    """The same by tape: parameters of one block may lie on two, as adapters and their base."""
    found: dict[Any, dict[int, None]] = {}
    for r in leaves:
        if isinstance(r, Ref):
            found.setdefault(r.tape, {})[r.unit] = None
    for tape, units in found.items():
        names = {tape.whole.structure.units[u].name for u in units} if len(units) > 1 else ()
        if len(names) > 1:
            why = f"one block holds parameters of the units {sorted(names)}"
            raise TypeError(f"fz.layers: {why}; give it a list with one tree a block")
    return {tape: tuple(units) for tape, units in found.items()}


def run_block(
    block: Callable[..., Any],
    params: tuple[list[Any], Any],
    group: Group,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    guess: Group,
    remat: bool,
) -> Any:
    """block(params, *args, **kwargs) on one block, in either form; params is flat: (leaves, treedef)."""
    refs, bdef = params
    if not group and not remat:
        # as at the seam: a call's uses are summed first
        each = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in refs]
        return block(tree.unflatten(each, bdef), *args, **kwargs)
    plain = all(isinstance(a, Tensor) for a in args)
    flat, adef = (list(args), None) if plain else tree.flatten(args)
    values = refs + flat
    taken = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    outdef: list[Any] = []

    def run(leaves: dict[int, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        full = [leaves[v.leaf] if isinstance(v, Ref) else v for v in values]
        for i, t in zip(taken, inputs, strict=True):
            full[i] = t
        given = full[len(refs) :] if adef is None else tree.unflatten(full[len(refs) :], adef)
        out = block(tree.unflatten(full[: len(refs)], bdef), *given, **kwargs)
        if isinstance(out, Tensor):
            return (out,)
        outs, spec = tree.flatten(out)
        outdef[:] = [spec]
        return tuple(outs)

    inputs = [values[i] for i in taken]
    tape = next((v.tape for v in refs if isinstance(v, Ref)), None)
    if isinstance(tape, Recording):
        outs = tape.run(group, guess, run, inputs, remat)
    elif isinstance(tape, Parts):
        outs = tape.run(group, run, inputs)
    elif tape is None or remat and not tape.seam:
        outs = rerun_resting(run, tape, group, inputs)
    elif remat and torch.is_grad_enabled() and tape.differentiate:
        learning = [u for u in group if not tape.whole.structure.units[u].frozen]
        tape.arrivals.use(tuple(learning))
        ports = [x for u in learning for x in node(tape, u)]
        buffers, visit = tape.enter(group, guess)
        outs = Rerun.apply(tape, visit, buffers, run, len(ports), *ports, *inputs)
        tape.course.ran(visit, outs)
    else:
        outs = run_unit(tape, group, lambda leaves: run(leaves, inputs), guess)
    return tree.unflatten(list(outs), outdef[0]) if outdef else outs[0]


def _no_captures(block: Callable[..., Any], units: bool, again: bool) -> None:
    """Refuse closures over tensors that need a gradient, which the remat form could not see; with units also over those
    that torch.func is transforming; and, where every derivative runs the block again, what its object holds.
    """
    for x in captured(block, units, owned=again):
        what = f"parameter {x.path!r}" if isinstance(x, Ref) else f"a tensor of shape {tuple(x.shape)}"
        raise TypeError(
            f"fz.layers: the block captures {what}, which needs a gradient; hand it in: fz.layers(block, blocks, x, it)"
        )


def captured(fn: Callable[..., Any], transformed: bool = False, owned: bool = False) -> Iterator[Any]:
    """Closed parameters, and tensors that need a gradient, in the closures of a function and of those that it captures.

    Args:
      transformed: also those that torch.func is transforming.
      owned: also in the object whose method it is, and in global variables.
    """
    for x in held_by(fn, owned):
        if isinstance(x, Ref) or isinstance(x, Tensor) and (differentiated(x) if transformed else x.requires_grad):
            yield x

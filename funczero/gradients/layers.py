"""The seam: where a loss opens one unit of parameters after another, so that ZeRO-3 holds two units and never the
model.

A unit is gathered just before it runs, dropped after it, gathered again in the backward, and its gradient is scattered
as soon as it exists: the next gather and the last scatter travel while a block computes. Program order is the schedule.
Two forms: *keep* (saved tensors that live in the gathered buffer are swapped for their coordinates) and *remat* (only
the block's inputs are saved).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from funczero.core import rng, tree
from funczero.gradients.arrivals import Group
from funczero.gradients.draws import foreseen
from funczero.gradients.ref import Ref
from funczero.gradients.surroundings import Uncached, here, restored
from funczero.gradients.tape import Tape

Run = Callable[[dict[int, Tensor]], Any]  # a block as a function of its open leaves, by leaf number


class _Rerun(torch.autograd.Function):
    """A block that saves only its inputs: run again in the backward, in the surroundings of its first run.

    Its units' leaves come in as stand-ins (Tape.node), so that a backward that does not ask for the parameters books
    none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        group: Group,
        around: tuple[Group, Group],
        run: Callable[..., Any],
        n: int,
        *tensors: Tensor,
    ) -> Any:
        inputs = tensors[n:]
        ctx.tape, ctx.group, ctx.before, ctx.run, ctx.n, ctx.needs = (
            tape,
            group,
            around[0],
            run,
            n,
            ctx.needs_input_grad[5 + n :],
        )
        ctx.surroundings = here(tape.port.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        opened = {u: tape.take(u) for u in group}
        tape.ahead(*around[1])
        # torch chooses kernels by what needs a gradient:
        with torch.autograd.graph.saved_tensors_hooks(_keep_nothing, _keep_nothing):
            with foreseen(tape.port.device, _drew):
                # a graph that keeps nothing, so that both runs give the same bits
                outs, _, _ = _run_fresh(ctx, opened, inputs)
        tape.count(-len(group))
        result = tuple(x.detach() if isinstance(x, Tensor) else x for x in outs)
        ctx.mark_non_differentiable(
            *(y for x, y in zip(outs, result, strict=True) if isinstance(x, Tensor) and not x.requires_grad)
        )
        return result

    @staticmethod
    def backward(ctx: Any, *gouts: Tensor | None) -> tuple[Any, ...]:
        tape = ctx.tape
        if torch.is_grad_enabled():
            why = (
                "a block that runs again in the backward (remat) is first-order only, but create_graph=True asks for a"
                " second derivative"
            )
            raise RuntimeError(f"value_and_grad(units=...): {why}; leave remat out for this loss")
        with restored(ctx.surroundings):
            opened = {u: tape.again(u, ctx.group, ctx.before) for u in ctx.group}
            outs, own, inputs = _run_fresh(ctx, opened, ctx.saved_tensors)
        pairs = [(o, g) for o, g in zip(outs, gouts, strict=True) if g is not None and o.requires_grad]
        wanted = [*own, *(x for x in inputs if x.requires_grad)]
        found: Any = [None] * len(wanted)
        if pairs:
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        del opened, outs, pairs
        for u in ctx.group:
            tape.drop(u)
        rest = iter(found[ctx.n :])
        return (*(None,) * 5, *found[: ctx.n], *(next(rest) if x.requires_grad else None for x in inputs))


def _drew(kind: str) -> RuntimeError:
    why = (
        f"a block that runs again in the backward (remat) draws from {kind}'s global generator, and would draw other"
        " numbers then"
    )
    return RuntimeError(f"fz.layers: {why}; draw before the block and hand the numbers in, or leave remat out")


def _keep_nothing(x: Any) -> Any:
    return None


def _run_fresh(ctx: Any, opened: dict[int, Tensor], saved: Sequence[Tensor]) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A block as a function of fresh leaves: (its outputs, its units' leaves that learn, its inputs)."""
    whole, inputs = ctx.tape.whole, [x.detach().requires_grad_(need) for x, need in zip(saved, ctx.needs, strict=True)]
    leaves = ctx.tape.open_leaves(opened)
    own = {
        i: leaves[i].requires_grad_()
        for u in ctx.group
        if not whole.structure.units[u].frozen
        for i in whole.structure.members[u]
    }
    before = ctx.tape.copies(leaves)
    with torch.enable_grad(), Uncached():
        outs = ctx.run(leaves, inputs)
    ctx.tape.untouched(leaves, before)
    return outs, list(own.values()), inputs


def _run_open(tape: Tape, leaves: dict[int, Tensor], run: Run) -> Any:
    """A block on its open leaves."""
    before = tape.copies(leaves)
    with Uncached():
        out = run(leaves)
    tape.untouched(leaves, before)
    return out


def _run_once(tape: Tape, group: Group, run: Run, after: Group) -> Any:
    """A forward that nothing will differentiate."""
    opened = {u: tape.take(u) for u in group}
    tape.ahead(*after)
    out = _run_open(tape, tape.open_leaves(opened), run)
    tape.count(-len(group))
    return out


def run_unit(tape: Tape, group: Group, run: Run, before: Group = (), after: Group = ()) -> Any:
    """`run(leaves)` on one block, keep form. Gradients reach the tape; gathered buffers live only while they are read.

    Args:
      before, after: neighbours in the forward, whose gathers start early.
    """
    if not tape.seam:
        return _run_open(tape, tape.resting_leaves(group), run)
    if not torch.is_grad_enabled() or not tape.differentiate:
        return _run_once(tape, group, run, after)
    buffers = {u: tape.take(u) for u in group}
    tape.ahead(*after)
    leaves = tape.open_leaves(buffers, track=True)
    if not tape.rest:
        return _run_open(tape, leaves, run)
    memory = {b.untyped_storage()._cdata: u for u, b in buffers.items()}
    held = {} if after else buffers
    del buffers

    def pack(t: Tensor) -> Any:
        unit = memory.get(t.untyped_storage()._cdata)
        return t if unit is None else (unit, t.shape, t.stride(), t.storage_offset())

    def unpack(saved: Any) -> Tensor:
        return tape.again(saved[0], group, before).as_strided(*saved[1:]) if type(saved) is tuple else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = _run_open(tape, leaves, run)
    if held:
        tape.keep(held)
    else:
        tape.count(-len(group))
    return out


# --- what a loss writes -----------------------------------------------------------------------------------------------
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
    _no_captures(block)
    auxes = []
    opened = [tree.flatten(b) for b in blocks]
    groups = [group_of(refs) for refs, _ in opened]
    for i, params in enumerate(opened):
        kwargs = {} if key is None else {"key": rng.fold(key, i)}
        around = (groups[i - 1] if i else (), groups[i + 1] if i + 1 < len(groups) else ())
        x = run_block(block, params, groups[i], (x, *shared), kwargs, around, remat)
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
    if tape.seam:
        leaves = tape.open_leaves(
            {u: tape.take(u) for u in units}, track=torch.is_grad_enabled() and tape.differentiate
        )
    else:
        leaves = tape.resting_leaves(units)
    tape.lend(leaves)
    return tree.unflatten([leaves[r.leaf] if isinstance(r, Ref) else r for r in flat], treedef)


def group_of(leaves: list[Any]) -> Group:
    """The units that one block's closed parameters lie in."""
    refs = {r.unit: r for r in leaves if isinstance(r, Ref)}
    names = {r.tape.whole.structure.units[u].name for u, r in refs.items()}
    if len(names) > 1:
        raise TypeError(
            f"fz.layers: one block holds parameters of the units {sorted(names)}; give it a list with one tree a block"
        )
    return tuple(refs)


def run_block(
    block: Callable[..., Any],
    params: tuple[list[Any], Any],
    group: Group,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Any,
    remat: bool,
) -> Any:
    """block(params, *args, **kwargs) on one block, in either form; params is flat: (leaves, treedef)."""
    refs, bdef = params
    if not group and not remat:
        # as at the seam: a call's uses are summed first
        each = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in refs]
        return block(tree.unflatten(each, bdef), *args, **kwargs)
    flat, adef = tree.flatten(args)
    values = refs + flat
    taken = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    outdef: list[Any] = []

    def run(leaves: dict[int, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        own = [leaves[v.leaf] if isinstance(v, Ref) else v for v in values]
        for i, t in zip(taken, inputs, strict=True):
            own[i] = t
        out = block(tree.unflatten(own[: len(refs)], bdef), *tree.unflatten(own[len(refs) :], adef), **kwargs)
        if isinstance(out, Tensor):
            return (out,)
        outs, spec = tree.flatten(out)
        outdef[:] = [spec]
        return tuple(outs)

    inputs = [values[i] for i in taken]
    tape = next((v.tape for v in refs if isinstance(v, Ref)), None)
    if tape is None or remat and not tape.seam:
        outs = _checkpoint(run, tape, group, inputs)
    elif remat and torch.is_grad_enabled() and tape.differentiate:
        learning = [u for u in group if not tape.whole.structure.units[u].frozen]
        tape.arrivals.use(tuple(learning))
        ports = [x for u in learning for x in tape.node(u)]
        outs = _Rerun.apply(tape, group, around, run, len(ports), *ports, *inputs)
    else:
        outs = run_unit(tape, group, lambda leaves: run(leaves, inputs), *around)
    return tree.unflatten(list(outs), outdef[0]) if outdef else outs[0]


def _checkpoint(run: Callable[..., Any], tape: Tape | None, group: Group, inputs: list[Tensor]) -> Any:
    """Remat where nothing is gathered. Views: as in _Rerun, a block's uses of a tensor are summed before those of
    other blocks are added.
    """
    leaves = {} if tape is None else tape.resting_leaves(group)
    numbers, n = list(leaves), len(inputs)
    device = inputs[0].device if tape is None and inputs else torch.device("cpu") if tape is None else tape.port.device
    found = here(device)

    def again(*xs: Tensor) -> Any:
        with restored(found) if rerun else nullcontext(), Uncached():
            return run(dict(zip(numbers, xs[n:], strict=True)), xs[:n])

    rerun = False
    views = [*(x.view_as(x) if x.requires_grad else x for x in inputs), *leaves.values()]
    before = None if tape is None else tape.copies(leaves)
    with foreseen(device, _drew):
        outs = checkpoint(again, *views, use_reentrant=False, preserve_rng_state=False)
    rerun = True
    if tape is not None:
        tape.untouched(leaves, before)
    return outs


def _no_captures(block: Callable[..., Any]) -> None:
    """Refuse closures over tensors that need a gradient: the remat form could not see it."""
    for x in captured(block):
        what = f"parameter {x.path!r}" if isinstance(x, Ref) else f"a tensor of shape {tuple(x.shape)}"
        raise TypeError(
            f"fz.layers: the block captures {what}, which needs a gradient; hand it in: fz.layers(block, blocks, x, it)"
        )


def captured(fn: Callable[..., Any]) -> Iterator[Any]:
    """Closed parameters, and tensors that need a gradient, in the closures of a function and of those that it
    captures.
    """
    seen: list[Any] = [fn]
    for inner in seen:
        plain = getattr(inner, "func", inner)  # functools.partial
        if not (getattr(plain, "__closure__", None) or plain is not inner):
            continue
        cells = [c.cell_contents for c in getattr(plain, "__closure__", None) or () if c.cell_contents is not inner]
        for x in tree.leaves((cells, getattr(inner, "args", ()), getattr(inner, "keywords", {}))):
            if isinstance(x, Ref) or isinstance(x, Tensor) and x.requires_grad:
                yield x
            if callable(x) and getattr(x, "__closure__", None) and x not in seen and len(seen) < 16:
                seen.append(x)

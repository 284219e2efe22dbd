"""The blocks of a module at the seam: a unit is opened, its parameters are bound, the block runs, and it is closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.gradients.arrivals import Group
from funczero.gradients.keep import run_units
from funczero.gradients.layers import run_block
from funczero.gradients.parts import Parts
from funczero.gradients.recording import NotCaptured, Recording
from funczero.gradients.ref import Ref
from funczero.gradients.units import neighbours

Forward = Callable[
    [dict[str, Any], tuple[Any, ...], dict[str, Any]], Any
]  # (parameters by name, args, kwargs) -> output


class Again(NamedTuple):
    """What a block that runs again in the backward must keep, and the caller's words for it."""

    who: str
    what: str
    without: str  # how to leave it out
    check: Callable[[str, Any, list[Tensor]], None]  # (path, output, what the block may read): refuses anything else


class Blocks(NamedTuple):
    """The blocks of one forward in the module's order."""

    paths: list[str]
    groups: list[dict[Any, Group]]  # by tape, the units that each one's parameters lie in

    def run(
        self,
        i: int,
        closed: dict[str, Any],
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        again: Again | None = None,
    ) -> Any:
        """forward(parameters, *args, **kwargs) of block i, with its unit open for as long as it runs.

        Args:
          closed: the block's parameters by name: Refs, or whole where nothing is sharded.
          forward: binds the parameters, runs the block and lets them go, also where it raises.
          again: the block saves only its inputs, and runs again in the backward; always given where it may be
            differentiated twice (Parts).
        """
        path, groups = self.paths[i], self.groups[i]
        after = neighbours(self.paths, i)[1]
        guess = {} if after is None else self.groups[after]
        parts = [(tape, group, guess.get(tape, ())) for tape, group in groups.items()]
        again_asked = again is not None and torch.is_grad_enabled()
        if len(parts) > 1 and any(isinstance(tape, Recording) for tape in groups):
            raise NotCaptured(f"the parameters of unit {path!r} lie with the step and beside it (fz.beside)")
        if len(parts) > 1 and (again_asked or any(isinstance(tape, Parts) for tape in groups)):
            why = "its parameters lie with the step and beside it (fz.beside), and it runs again for its derivatives"
            raise TypeError(f"stateless: unit {path!r}: {why}; leave out remat, gradient_checkpointing or higher_order")
        tape, group, ahead = parts[0] if parts else (None, (), ())
        if isinstance(tape, Recording):
            own = forward if again is None else _checked(path, forward, again)
            how = "is recorded"
            return run_block(
                own, tree.flatten(closed), group, repeatable(path, args, kwargs, how), {}, ahead, again_asked
            )
        if again is not None and (again_asked or isinstance(tape, Parts)):
            twice = _checked(path, forward, again)
            return run_block(twice, tree.flatten(closed), group, repeatable(path, args, kwargs), {}, ahead, True)
        if tape is None or isinstance(tape, Parts):
            return forward(closed, args, kwargs)
        order = {tape: n for n, tape in enumerate(groups)}
        opened = lambda leaves: forward(
            {n: leaves[order[r.tape]][r.leaf] if isinstance(r, Ref) else r for n, r in closed.items()}, args, kwargs
        )
        return run_units(parts, opened)


def _checked(path: str, forward: Forward, again: Again) -> Forward:
    """A forward that is refused where its second run would not be its first."""

    def twice(own: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = [(x, x._version) for x in tree.tensors((args, kwargs))]
        out = forward(own, args, kwargs)
        if any(x._version != version for x, version in before):
            why = f"changes an input in place; write x = x + y, or {again.without}"
            raise RuntimeError(f"{again.who}: unit {path!r} runs again in the backward ({again.what}), but {why}")
        again.check(path, out, [*own.values(), *(x for x, _ in before)])
        return out

    return twice


def repeatable(
    path: str, args: tuple[Any, ...], kwargs: dict[str, Any], how: str = "runs again in the backward (remat)"
) -> tuple[Any, Any]:
    """Arguments of a block that runs twice, without empty key-value caches, which it would fill twice.

    Args:
      how: what is done with it.

    Raises:
      TypeError: an argument is another object, which may be another one at the second run.
    """
    empty = lambda x: callable(getattr(x, "get_seq_length", None)) and int(x.get_seq_length()) == 0
    bare = {k: False if k == "use_cache" else None if empty(x) else x for k, x in kwargs.items()}
    both = tuple(None if empty(x) else x for x in args), bare
    objects = (x for x in tree.leaves(both) if hasattr(x, "__dict__") and not isinstance(x, Tensor) and not callable(x))
    odd = next(objects, None)
    if odd is not None:
        why = (
            f"it is handed a {type(odd).__name__}, which may change in between or hold tensors that need a gradient; "
            "leave that out, or leave out remat"
        )
        raise TypeError(f"stateless: unit {path!r} {how}, but {why}")
    return both

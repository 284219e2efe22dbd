"""Any optax-shaped pair as an optimizer of a chain."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from funczero.core import tree
from funczero.core.number import flag, shown
from funczero.core.optimizer import GradientTransformation, Needs
from funczero.transforms.shares import foreign


def lift(
    pair: Any, name: str | None = None, elementwise: bool | None = None, needs: Needs | None = None
) -> GradientTransformation:
    """An `(init, update)` pair on pytrees of tensors, with parameters <- parameters + updates.

    Inside a bracket it is handed as much of the leaves as is said here. Nothing can try that out: a pair may read whole
    leaves above a size, or from some update on. So it is promised, or the bracket refuses the pair.

    Args:
      pair: has `init(params) -> state` and `update(grads, state, params) -> (updates, state)`; any optax-shaped tuple,
        and torchopt's, whose params and inplace are keywords.
      name: where its state is kept; by default the pair's own name, or "lift".
      elementwise: True is needs="elementwise"; False says that it needs whole leaves, and None says nothing (what a
        GradientTransformation says of itself stays): both run where leaves are whole.
      needs: "elementwise" promises that every value of updates and state depends on its own place alone: it is handed
        this rank's part of every leaf. "leafwise": each leaf moves by itself: it is handed trees of one whole leaf, on
        the rank that owns it, with a state of tensors for each leaf, also where nothing is cut. "whole": it is handed
        all leaves whole, on every rank, at the cost of a chain without ZeRO.

    Raises:
      TypeError: this is no pair, or one of another library.
      ValueError: needs is none of these.

    >>> descend = (lambda params: (), lambda grads, state, params: (tree.map(lambda g: -0.1 * g, grads), state))
    >>> lift(descend, "descend", elementwise=True).name
    'descend'
    """
    init, update = (
        (pair[0], pair[1])
        if isinstance(pair, tuple) and len(pair) >= 2
        else (getattr(pair, "init", None), getattr(pair, "update", None))
    )
    label = name or getattr(pair, "name", None) or "lift"
    why = foreign(pair)
    if why is not None:
        raise TypeError(f"lift: {why}")
    if not (callable(init) and callable(update)):
        raise TypeError(
            f"lift: {shown(pair)} is no pair of functions; write (init, update), or an object that has both"
        )
    if not isinstance(label, str) or not re.fullmatch(r"[^/#()|]+", label):
        raise ValueError(
            f"lift: name={label!r} would not tell leaves of the state apart on disk; write a word without / # ( ) and |"
        )
    if elementwise is not None:
        flag("lift", "elementwise", elementwise)
    if needs not in (None, "elementwise", "leafwise", "whole") or needs is not None and elementwise is not None:
        raise ValueError(
            f"lift: needs={shown(needs)}{f' beside elementwise={elementwise}' * (elementwise is not None)} does not say"
            " how much of a leaf moves a value; write needs='elementwise', 'leafwise' or 'whole' alone"
        )
    own = pair.needs if isinstance(pair, GradientTransformation) else None
    own = needs or ("leafwise" if own == "leaf_norms" else own)  # without a formula
    return GradientTransformation(init, _called(update), None, label, own, elementwise)


def _called(update: Callable[..., Any]) -> Callable[..., Any]:
    """An update as it is called here, (grads, state, params), where its parameters are a keyword."""
    try:
        known = inspect.signature(update).parameters
    except (TypeError, ValueError):
        return update
    params = known.get("params")
    if params is None or params.kind is not params.KEYWORD_ONLY:
        return update
    still = {"inplace": False} if "inplace" in known else {}
    return lambda grads, state, params: update(grads, state, params=params, **still)


def same_when_cut(init: Callable[..., Any], update: Callable[..., Any], updates: int = 12) -> bool:
    """Does a pair give the same values on rows of leaves as on whole ones, tried on random leaves?

    It proves a dependence and never its absence: what begins later, or above these sizes, is not seen. So nothing is
    trusted for it where a promise can be asked for.
    """
    generator = torch.Generator().manual_seed(0)
    shapes, at = {"matrix": (8, 6), "vector": (8,), "large": (136, 130), "long": (136,)}, (3, 50)

    def draw() -> dict[str, torch.Tensor]:
        return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}

    params, grads = draw(), [draw() for _ in range(updates)]

    def run(part: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        cut = lambda t: tree.map(lambda x: part(x).clone(), t)  # noqa: E731
        state, here, seen = init(cut(params)), cut(params), []
        for g in grads:
            moves, state = update(cut(g), state, here)
            here = tree.map(torch.add, here, moves)
            seen += tree.leaves(here)
        return seen

    row = lambda x: at[x.shape[0] > 8]  # noqa: E731
    whole, first, second = run(lambda x: x), run(lambda x: x[: row(x)]), run(lambda x: x[row(x) :])
    return all(
        torch.allclose(w, torch.cat([a, b]), rtol=1e-9, atol=1e-12)
        for w, a, b in zip(whole, first, second, strict=True)
    )

"""The first state of a step: masters, views and every transform's own, cut from whole parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from funczero.core import tree
from funczero.core.number import dtype_name
from funczero.core.policy import Policy
from funczero.core.types import Grad, TrainState
from funczero.layout.lazy import Lazy, all_find, lazy
from funczero.layout.slots import Slots
from funczero.layout.where import Where, apart
from funczero.step.fits import differs
from funczero.transforms.chain import Source


def read_lazily(source: Source, g: Grad, params: Any, device: torch.device) -> Lazy:
    """Whole parameters, read part by part, with the units, cuts and ties that the chain gives them.

    Raises:
      ValueError: a pattern of freeze, rules or units finds no leaf.
    """
    own = lazy(params, source.units, g.env.rules, source.frozen, device, source.ties)
    all_find(source.patterns, g.env.rules, own.structure)
    return own


def initial(g: Grad, own: Lazy, key: int) -> TrainState:
    """The state before the first update; on the meta device it is shapes alone."""
    state = g.init(own)
    masters = state.pop("params")
    rest = apart(masters.where, Where(own.structure, g.env.mesh.coords(g.layout.rest)))
    views = None if rest is None else own.at(rest.coords, g.env.policy.compute, rest.place)
    if views is not None and differs(g):
        views = Slots(views.buffers, replace(views.where, memory=True))
    zero = torch.zeros((), dtype=torch.int64)
    return TrainState(masters, views, state, zero, zero.to(own.device, copy=True), torch.tensor(key))


def check_widening(params: Any, policy: Policy) -> None:
    """Refuse parameters that hold more than a master keeps.

    Raises:
      TypeError: a parameter is wider than `policy.params`.
    """
    for path, x in tree.paths(params):
        if torch.finfo(x.dtype).bits > torch.finfo(policy.params).bits:
            have, keep = map(dtype_name, (x.dtype, policy.params))
            raise TypeError(
                f"init: parameter {path!r} is {have}, but the policy keeps masters in {keep}; write policy='{have}', or"
                " cast the parameters first"
            )

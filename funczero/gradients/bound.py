"""One call of a module's snapshot: a fresh copy of its tree, bound, run unit by unit, and looked through for what it
would forget.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from funczero.core import tree
from funczero.core.recorded import recording
from funczero.gradients.blocks import Again, Blocks
from funczero.gradients.draws import Trail, keyed
from funczero.gradients.layers import groups_of
from funczero.gradients.parts import Parts
from funczero.gradients.ref import Ref
from funczero.gradients.snapshot import Slot, Snapshot, copied, places
from funczero.gradients.synced import Across, normed


class Own(NamedTuple):
    """The buffers of one call."""

    values: Mapping[str, Tensor]  # by name, in place of the module's
    changes: bool  # may the forward change them?
    across: Across | None = None  # ranks over which layers take statistics


def run_once(
    snapshot: Snapshot,
    loss: Callable[..., Any],
    params: dict[str, Any],
    batch: Any,
    key: int | None,
    own: Own,
) -> Any:
    """The loss on a fresh copy; None where the forward has made settings that count from its beginning.

    A state that changes is returned behind the sum and its weight.
    """
    values, changes = own.values, own.changes
    call = Call(snapshot, params, refuse=key is None)
    copies, buffers = call.bound(snapshot, values)
    for m in copies.values():
        if isinstance(m, nn.SyncBatchNorm):
            itself: Any = weakref.proxy(m)
            m.__dict__["forward"] = partial(normed, itself, own.across)
    may = (snapshot.computed | values.keys()) if changes else snapshot.computed
    fixed = [b for b, name in zip(buffers, snapshot.named, strict=True) if name not in may]
    versions, lengths = [x._version for _, x in fixed], snapshot.changes.lengths()
    with keyed(key, call.device, partial(_drew, snapshot.root, call.trail)):
        result = loss(copies[id(snapshot.root)], batch)
    _check_buffers(copies, fixed, versions)
    if snapshot.changes.check(copies, lengths):
        return None
    ports = [x for t in call.tapes for x in t.ports]  # they stand for what is closed
    snapshot.check_leaves("", result, [*tree.tensors((params, batch)), *ports])
    if not changes:
        return result
    places = dict(reversed([(n, slot) for n, (slot, _) in zip(snapshot.named, snapshot.buffers, strict=True)]))
    new = {n: _at(getattr(copies[m], box), k).clone() for n in values for m, box, k, _ in (places[n],)}
    if not isinstance(result, tuple):
        return result, new
    sums = 2 if len(result) > 1 and isinstance(result[1], (Tensor, int, float)) else 1  # a mean may have an aux, too
    return (*result[:sums], new, *result[sums:])


class Call:
    """One forward. Its copies of the blocks hold it, and never the other way.

    A cycle would keep gathered memory until a collection.
    """

    def __init__(self, snapshot: Snapshot, params: dict[str, Any], refuse: bool = False) -> None:
        """params: by the names that stateless returned, whole or closed; refuse: a unit that draws is named."""
        if not isinstance(params, dict) or params.keys() != snapshot.names:
            odd = f"are a {type(params).__name__}"
            if isinstance(params, dict):
                odd = f"differ in {sorted(snapshot.names ^ params.keys())[0]!r}"
            remedy = "give a flat dict with the names of the one that stateless returned"
            raise ValueError(f"stateless: the parameters {odd}; {remedy}")
        taught = next((n for n in snapshot.frozen if params[n].requires_grad), None)
        if taught is not None:
            why = "is frozen in the module (requires_grad=False) but is differentiated here"
            remedy = (
                "write value_and_grad(loss_fn, trainable=loss_fn.trainable, ...), "
                "or module.requires_grad_() before fz.stateless"
            )
            raise TypeError(f"stateless: parameter {taught!r} {why}; {remedy}")
        self.units, self.check_leaves, self.params = snapshot.units, snapshot.check_leaves, params
        first = next(iter(params.values()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.trail = Trail(self.device) if refuse else None
        self.tapes = {r.tape for r in params.values() if isinstance(r, Ref)}
        self.twice = any(isinstance(tape, Parts) for tape in self.tapes)  # may a block be differentiated twice?
        groups = [groups_of([params[name] for *_, name in u.slots]) for u in self.units]
        self.blocks = Blocks([u.path for u in self.units], groups)

    def bound(
        self, snapshot: Snapshot, values: Mapping[str, Tensor]
    ) -> tuple[dict[int, nn.Module], list[tuple[Slot, Tensor]]]:
        """A fresh copy of the modules, with parameters and buffers in their places; units are closed until they run.

        Args:
          values: of buffers by name; copies of them are bound, and the others as the module has them.
        """
        odd = next(iter(values.keys() - snapshot.named), None)
        if odd is not None:
            why = f"the model state has {odd!r}, which is no buffer of the module"
            raise ValueError(f"stateless: {why}; it has {snapshot.named[:8]}")
        copies, own = copied(snapshot.wiring), {n: x.clone() for n, x in values.items()}
        with _disable_current_modes() if recording() else nullcontext():  # they stay where they are then
            snapshot.buffers = [(slot, x.to(self.device)) for slot, x in snapshot.buffers]
        buffers = [(slot, own.get(n, x)) for n, (slot, x) in zip(snapshot.named, snapshot.buffers, strict=True)]
        for (m, box, key, _), x in buffers:
            getattr(copies[m], box)[key] = x
        moving = [slot for n, (slot, _) in zip(snapshot.named, snapshot.buffers, strict=True) if n in own]
        _bind(places(snapshot.slots, copies), self.params)
        for i, unit in enumerate(self.units):
            block = copies[unit.module]
            forward = block.__dict__.get("forward")
            held = places([s for s in moving if s[0] in unit.inside], copies)
            where = places(unit.slots, copies)
            block.__dict__["forward"] = partial(self.run, i, weakref.ref(block), where, held, forward)
        return copies, buffers

    def run(
        self, i: int, block: Any, where: list[Any], held: list[Any], forward: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Unit i: opened, bound, run, closed.

        Args:
          where, held: the places of its parameters and of buffers that it may change.
        """
        unit, module = self.units[i], block()
        closed, again = {name: self.params[name] for _, _, name in where}, None
        if self.twice and any(isinstance(x, Ref) and isinstance(x.tape, Parts) for x in closed.values()):
            again = Again("stateless", "higher_order", "write fz.stateless(..., units=())", self.check_leaves)
        elif unit.again:
            again = Again("stateless", "remat", "leave out remat", self.check_leaves)
        first = Once(held if again is not None else [])

        def bound(own: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            _bind(where, own)
            try:
                with first.run() if first.held else nullcontext():
                    return (forward or partial(type(module).forward, module))(*args, **kwargs)
            finally:
                _bind(where, self.params)

        out = self.blocks.run(i, closed, bound, args, kwargs, again)
        if self.trail is not None:
            self.trail.passed(unit.path)
        return out


class Once:
    """Buffers that a block changes, which may run more than once: only its first run counts, and others find what it
    found.
    """

    def __init__(self, held: list[tuple[Any, Any, str]]) -> None:
        self.held, self.ran = held, False
        self.before = [box[key].clone() for box, key, _ in held]

    @contextmanager
    def run(self) -> Iterator[None]:
        """One run."""
        if not self.ran or not self.held:
            self.ran = True
            yield
            return
        after = [box[key] for box, key, _ in self.held]
        for (box, key, _), x in zip(self.held, self.before, strict=True):
            box[key] = x.clone()
        try:
            yield
        finally:
            for (box, key, _), x in zip(self.held, after, strict=True):
                box[key] = x


def _bind(where: list[tuple[Any, Any, str]], values: dict[str, Any]) -> None:
    for held, key, name in where:
        held[key] = values[name]


def _check_buffers(copies: dict[int, nn.Module], buffers: list[tuple[Slot, Tensor]], versions: list[int]) -> None:
    """Refuse what would be forgotten: a changed buffer, or tensor among the attributes.

    A buffer outside the state_dict may be replaced on the copy.
    """
    for ((m, box, key, name), x), version in zip(buffers, versions, strict=True):
        module = copies[m]
        lasting = box != "_buffers" or key not in module._non_persistent_buffers_set
        if x._version != version or lasting and _at(getattr(module, box), key) is not x:
            what = "buffer" if box == "_buffers" else "tensor"
            why = f"changes {what} {name!r}, but a pure loss has nowhere to keep it"
            remedy = (
                f"write fz.stateless(..., state={re.escape(name)!r}), which makes it a state of the model, or"
                " fz.stateless(module.eval(), ...) where nothing should change"
            )
            raise RuntimeError(f"stateless: the forward of {type(module).__name__} {why}; {remedy}")


def _at(box: Any, key: Any) -> Any:
    return box.get(key) if isinstance(box, dict) else box[key] if key < len(box) else None


def _drew(m: nn.Module, trail: Trail | None, kind: str) -> Exception:
    """Who drew random numbers, as far as can be told: an active dropout layer, first of the block that drew."""
    path = trail.drew() if trail is not None and kind == "torch" else ""
    dropouts = [(n, x) for n, x in m.named_modules() if isinstance(x, nn.modules.dropout._DropoutNd)]
    active = {n: x for n, x in dropouts if x.training and x.p > 0 and kind == "torch"}
    who = next((n for n in active if n.startswith(f"{path}.")), next(iter(active), ""))
    what = f"the forward of {path!r}, or what runs before it," if path else f"the forward of {type(m).__name__!r}"
    if who:
        what = f"{who!r} ({type(active[who]).__name__}, p={active[who].p})"
    why = f"draws from {kind}'s global generator, so the loss would not be a function of its arguments"
    remedy = (
        "write value_and_grad(loss_fn, ..., rng=True), "
        "or fz.stateless(module.eval(), ...) where nothing should be dropped"
    )
    return RuntimeError(f"stateless: {what} {why}; {remedy}")

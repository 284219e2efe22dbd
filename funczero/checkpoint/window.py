"""An open window of a streamed accumulate: how its partial sums lie, as a save writes and a restore finds them."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch
import torch.utils._pytree as pytree

from funczero.checkpoint import names
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.manifest import FILE, Manifest
from funczero.checkpoint.memory import torch_dtype
from funczero.checkpoint.target import Restorer
from funczero.core.number import dtype_name
from funczero.core.types import Sum, TrainState
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.transforms.accumulate import Accumulate
from funczero.transforms.exact import filled
from funczero.transforms.outputs import Aux, Form


def described(state: TrainState) -> dict[str, Any]:
    """How the partial sums of a streamed accumulate lie, as JSON, for whoever continues the window."""
    out: dict[str, Any] = {}
    for name, held in state.chain.items():
        if isinstance(held, Accumulate) and held.partial:
            out[name] = {"count": int(held.count), "partial": [_form(filled(p)) for p in held.partial]}
    return out


def _form(out: Sum) -> dict[str, Any]:
    aux = out.aux
    try:
        spec = None if aux is None else pytree.treespec_dumps(aux.form.treedef)
    except Exception:  # a node type that has no name in JSON
        spec = ""
    spec = spec if spec is None or _plain(spec) else ""
    tensors = {
        "loss": out.loss,
        "weight": out.weight,
        "aux": None if aux is None else aux.sums,
        "bad": out.bad,
        "used": out.used,
        "tops": out.tops,
        "micros": out.micros,
    }
    lists = {"rows": () if aux is None else aux.rows, "cat": () if aux is None else aux.cat, "moved": out.moved}
    like = lambda x: None if x is None else [dtype_name(x.dtype), list(x.shape)]
    return {
        **{k: like(x) for k, x in tensors.items()},
        **{k: [like(x) for x in xs] for k, xs in lists.items()},
        "spec": spec,
        "rules": None if aux is None else list(zip(aux.form.rules, aux.form.shapes, strict=True)),
        "axes": list(out.grads.where.axes),
        "grads": [like(b) for b in out.grads.buffers],
        "high": None if out.high is None else _placed(out.high),
    }


def _placed(x: Slots) -> dict[str, Any]:
    return {"axes": list(x.where.axes), "buffers": [[dtype_name(b.dtype), list(b.shape)] for b in x.buffers]}


def _plain(spec: str) -> bool:
    """Can a tree's form be read without importing what it names? Enums and default factories are imported by torch;
    escapes could hide them.
    """
    return not re.search(r"__enum__|defaultdict|\\u", spec)


def reopened(
    state: TrainState, manifest: Manifest, restorer: Restorer, notes: list[str]
) -> tuple[TrainState, set[str]]:
    """The state with empty partial sums of a window that is continued, and the counts of those that are replayed
    from their start.
    """
    chain, dropped = dict(state.chain), set()
    for name, held in state.chain.items():
        form = manifest.window.get(name) if isinstance(held, Accumulate) else None
        partial: tuple[Sum, ...] = ()
        if form is not None:
            same = restorer.chain is not None and (manifest.world, manifest.about.get("chain")) == (
                restorer.size,
                restorer.chain,
            )
            if same and all(p["spec"] != "" for p in form["partial"]):
                partial = _continued(form, state, restorer)
            else:
                dropped.add(f"{names.escape(name)}/count")
                notes.append(
                    f"{form['count']} micro-batches of an open window were left out: go on with the first one of update"
                    f" {manifest.step}; parameters have not moved"
                )
        if isinstance(held, Accumulate):
            chain[name] = Accumulate(torch.zeros(held.count.shape, dtype=held.count.dtype), partial)
    return state._replace(chain=chain), dropped


def _continued(form: dict[str, Any], state: TrainState, restorer: Restorer) -> tuple[Sum, ...]:
    try:
        return tuple(_empty(p, state, restorer) for p in form["partial"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise CheckpointError(
            f"restore: the open window in {FILE!r} has not the form that a save gives it ({type(e).__name__}: {e})"
        ) from None


def _empty(form: dict[str, Any], state: TrainState, restorer: Restorer) -> Sum:
    # gradients lie where a forward reads
    device = (state.params if state.views is None else state.views).buffers[0].device

    def make(x: Any) -> Any:
        return None if x is None else torch.zeros(x[1], dtype=torch_dtype(x[0]), device=device)

    scalars = [
        x[1] for k in ("loss", "weight", "aux", "bad", "used", "tops", "micros") if (x := form.get(k)) is not None
    ]
    beside = [x[1] for k in ("rows", "cat", "moved") for x in form.get(k, ())]
    if any(prod(x) > 1 << 24 for x in scalars + beside):
        raise _other_model()
    if form["aux"] is not None and not _plain(form["spec"]):
        raise ValueError("its metrics are no plain tree")
    rows, cat, moved = (tuple(map(make, form.get(k, ()))) for k in ("rows", "cat", "moved"))
    aux = None if form["aux"] is None else Aux(make(form["aux"]), rows, cat, _aux_form(form))
    loss, weight, bad, used, tops, micros = (
        make(form.get(k)) for k in ("loss", "weight", "bad", "used", "tops", "micros")
    )
    grads, high = _slots(form["axes"], form["grads"], state, restorer, make), form.get("high")
    large = None if high is None else _slots(high["axes"], high["buffers"], state, restorer, make)
    return Sum(loss, weight, aux, grads, bad, moved, used, tops, large, micros)


def _slots(axes: Any, buffers: Any, state: TrainState, restorer: Restorer, make: Any) -> Slots:
    """Empty gradients that a form describes."""
    structure = state.params.where.structure
    here = Where(structure, tuple((a, *restorer.coords[restorer.rank][a]) for a in axes))
    lengths = [0 if u.frozen else n for n, u in zip(here.lengths, structure.units, strict=True)]
    if [x[1] for x in buffers] not in ([[n] for n in lengths], [[n] for n in here.lengths]):
        raise _other_model()
    return Slots(tuple(make(x) for x in buffers), here)


def _other_model() -> CheckpointError:
    return CheckpointError(
        "restore: the open window's sums do not fit this model; restore without the step, and the update is replayed"
    )


def _aux_form(form: dict[str, Any]) -> Form:
    treedef = pytree.treespec_loads(form["spec"])
    rules = form.get("rules") or [("sum", ())] * treedef.num_leaves  # an older version knew only sums of numbers
    return Form(treedef, tuple(rule for rule, _ in rules), tuple(tuple(shape) for _, shape in rules))

"""Any `torch.nn.Module` as a pure loss function of a flat dict of parameters, with ZeRO-3 inside the module's own loop.

The module is never touched. A snapshot of its tree is taken once, without parameters. Every call runs on a fresh copy
of it, where each repeated block has a `forward` of ours: it opens its unit at the seam (blocks.py), binds the
parameters, runs, and lets them go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from absl import logging
from torch import Tensor, nn

from funczero.gradients.bound import Own, run_once
from funczero.gradients.buffers import state_rules
from funczero.gradients.layers import captured
from funczero.gradients.plans import planned
from funczero.gradients.snapshot import Snapshot
from funczero.gradients.synced import Across, is_synced
from funczero.gradients.units import conditional_of, find_units, sometimes
from funczero.transforms.model_state import Rule


def stateless(
    module: nn.Module,
    loss: Callable[..., Any],
    units: Sequence[str] | None = None,
    remat: bool = False,
    conditional: Sequence[str] | None = None,
    state: str | Sequence[tuple[str, Rule]] = (),
) -> tuple[Callable, dict[str, Tensor]]:
    """(loss_fn, params): a module as a pure loss over {dotted name: tensor}, its repeated blocks gathered one by one.

    The values are the module's own. value_and_grad reads `loss_fn.units`. `loss_fn.trainable` tells which paths require
    grad (None: all), `loss_fn.ties` which names are one tensor. What a forward draws from torch, python or numpy is a
    function of the key of value_and_grad(loss_fn, rng=True). Without a key drawing is refused. Given whole tensors,
    outside of any step, loss_fn is a plain function.

    >>> import torch
    >>> loss = lambda model, x: (model(x).sum(), torch.tensor(float(len(x))))
    >>> loss_fn, params = stateless(nn.Linear(2, 1, bias=False), loss)
    >>> [x.item() for x in loss_fn({"weight": torch.ones(1, 2)}, torch.ones(3, 2))], list(params)
    ([6.0, 3.0], ['weight'])

    Buffers that a forward changes, as batch norm's running statistics in training, are the model's state: then it is
    called as loss_fn(params, model_state, batch) and returns (sum, weight, model_state), where model_state is
    {name: buffer} and begins as `loss_fn.state`. In a step value_and_grad does so, and they are `state.model_state`.

    Args:
      module: read once, now, with its training mode, hooks and buffers. Its parameters may be on meta, where step.init
        gets what fz.from_pretrained or fz.init made. To evaluate write another one,
        stateless(module.eval(), loss), which step.eval gives the buffers of the state. Buffers follow the parameters'
        device. A forward that changes another buffer, a number or a container of its modules is refused. torch.compile
        is taken off, in print.
      loss: loss(model, batch) -> (sum, weight); model is called like the module.
      units: paths of lists of blocks, as "transformer.h", () for none. By default the lists (ModuleList, ModuleDict,
        Sequential) of blocks that look like layers. "auto": those that the module names itself, in print (plans.py).
      conditional: of the units, the lists whose blocks not every rank runs (see value_and_grad). By default lists
        called experts, and those whose layers are dropped.
      remat: save only each block's inputs and run it again in the backward. So does a block that has
        gradient_checkpointing set.
      state: a regex of buffers that the forward changes, or (regex, rule) pairs with the rules of value_and_grad. Those
        of torch's own layers are known: statistics of batch and instance norm by their mean, counters and vectors of
        spectral_norm by the first micro-batch's.

    Raises:
      ValueError: units names no list of blocks, or "auto" finds none named; state names no buffer, or a buffer has no
        values (meta).
      ChainError: conditional names no unit.
      TypeError: the loss captures a tensor that needs a gradient.
    """
    module = _readable(module, loss)
    if units == "auto":
        units, words = planned(module)
        logging.warning("%s", words)
    lists = find_units(module, units)
    some = conditional_of("stateless", lists, sometimes(module, lists) if conditional is None else conditional)
    snapshot = Snapshot(module, lists, remat)
    rules = state_rules(module, list(dict.fromkeys(snapshot.named)), state)

    def run(params: Any, batch: Any, key: int | None, own: Own) -> Any:
        result = run_once(snapshot, loss, params, batch, key, own)
        return run_once(snapshot, loss, params, batch, key, own) if result is None else result

    def loss_fn(params: dict[str, Any], batch: Any, key: int | None = None, across: Across | None = None) -> Any:
        return run(params, batch, key, Own({}, False, across))

    def with_state(
        params: dict[str, Any],
        model_state: Any,
        batch: Any = None,
        key: int | None = None,
        across: Across | None = None,
    ) -> Any:
        names = [name for name, _ in rules]
        if not isinstance(model_state, Mapping) or model_state.keys() != set(names):
            why = f"the forward changes buffers ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            raise TypeError(f"stateless: {why}; call loss_fn(params, model_state, batch), first with loss_fn.state")
        return run(params, batch, key, Own(model_state, True, across))

    frozen, once = snapshot.frozen, dict[int, Tensor]()
    fn: Any = with_state if rules else loss_fn
    fn.units, fn.ties, fn.keyed = snapshot.lists, snapshot.ties, True
    fn.conditional = some
    fn.trainable = (lambda path: path not in frozen) if frozen else None
    if rules:
        first = {name: x for name, (_, x) in zip(snapshot.named, snapshot.buffers, strict=True)}
        fn.state = {name: first[name].clone() for name, _ in rules}
        fn.rules = tuple((f"^{re.escape(n)}$", rule) for n, rule in rules if rule is not None)
    fn.user, fn.constants = (loss, *snapshot.shared()), lambda: [x for _, x in snapshot.buffers]
    fn.synced = is_synced(module)
    fn.reading = lambda values: partial(_read, run, values)
    return fn, {n: once.setdefault(id(p), p.detach()) for n, p in module.named_parameters(remove_duplicate=False)}


def _readable(module: nn.Module, loss: Callable[..., Any]) -> nn.Module:
    """The module itself, which torch.compile may have wrapped; refused where a snapshot would miss something."""
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module) and hasattr(module, "dynamo_ctx"):
        why = "what it made runs on the module that it was given; blocks run uncompiled"
        logging.warning("stateless: torch.compile is taken off, because %s", why)
        module = original
    meta = next((n for n, b in module.named_buffers() if b.is_meta), None)
    if meta is not None:
        remedy = "make the module with fz.from_pretrained, or with buffers on a device"
        raise ValueError(f"stateless: buffer {meta!r} is on the meta device and has no values; {remedy}")
    for x in captured(loss):
        what = f"captures a tensor of shape {tuple(x.shape)} that needs a gradient, which nobody would hear of"
        raise TypeError(f"stateless: the loss {what}; register it as a parameter of the module, or detach it")
    return module


def _read(
    run: Callable[..., Any], values: Mapping[str, Tensor], params: Any, batch: Any, key: int | None = None
) -> Any:
    """The loss of an evaluating module, with buffers of a model state."""
    return run(params, batch, key, Own(values, False))

"""An engine's optimizer state in the form of torch's own state_dict, whole, for any world and stage and for torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funczero.deepspeed.engine.engine import Engine
from funczero.deepspeed.engine.leaf import check_leaf, read_leaf, write_part
from funczero.deepspeed.optim.clients import Client
from funczero.transforms.loss_scale import ScaleLoss

BESIDE = "funczero"  # what torch's form has no place for


def optimizer_state(engine: Engine) -> dict[str, Any]:
    """torch's form on rank 0, and an empty dict elsewhere. A collective, leaf after leaf."""
    state, rank = engine.state, engine.global_rank
    own, names = _client(engine), _trained(engine)
    out: dict[int, dict[str, Tensor]] = {}
    for i, name, leaf in names if bool(own.started) else ():
        found = {k: x[leaf].clone().cpu() for k, x in own.scalars.items()}
        for k, slots in own.moments.items():
            read = partial(read_leaf, slots, name, engine.live_mesh)
            value = engine.together(f"optimizer.state_dict, {name!r}", read)
            assert value is not None
            found[k] = value.cpu() if rank == 0 else value
        if rank == 0:
            out[i] = found
    if rank != 0:
        return {}
    scale = engine.train_step.state_of(state, ScaleLoss)
    beside = {"step": int(state.step), "updates": int(state.updates)}
    if scale is not None:
        beside |= {"scale": {k: x.cpu() for k, x in scale._asdict().items()}}  # type: ignore[dict-item]
    return {"state": out, "param_groups": _packed(engine.optimizer.param_groups), BESIDE: beside}


def restore_optimizer(engine: Engine, saved: Mapping[str, Any]) -> None:
    """torch's form into the rows that this rank keeps; all ranks give the same.

    Raises:
      ValueError: it is another optimizer's, or of other parameters.
    """
    own, groups, theirs = _client(engine), engine.optimizer.param_groups, saved.get("param_groups", ())
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in theirs]:
        raise ValueError(
            f"load_state_dict: the optimizer has groups of {[len(g['params']) for g in groups]} parameters, and the"
            f" saved one has {[len(g['params']) for g in theirs]}; build the groups as they were"
        )
    place = dict(zip(_numbers(groups), _numbers(theirs), strict=True))
    kept = saved["state"]
    there = [(name, leaf, kept[place[i]]) for i, name, leaf in _trained(engine) if kept.get(place[i]) is not None]
    started = bool(there)
    lacking = [name for i, name, _ in _trained(engine) if started and place[i] not in kept]
    if lacking:
        raise ValueError(
            f"load_state_dict: there is no state of parameter {lacking[0]!r}, though others have one, and here all"
            " parameters are updated together; load the weights alone"
        )
    for name, _, mine in there:
        _check(name, mine, own)
    for name, leaf, mine in there:
        for k, x in own.scalars.items():
            x[leaf] = float(mine[k])
        for k, slots in own.moments.items():
            write_part(slots, name, torch.as_tensor(mine[k]))
    for g, other in zip(groups, theirs, strict=True):
        g.update({k: v for k, v in other.items() if k != "params"})
    state = engine.train_step.with_state(engine.state, own._replace(started=torch.full_like(own.started, started)))
    beside = saved.get(BESIDE, {})
    if beside:
        step, updates = (torch.full_like(x, beside[n]) for n, x in (("step", state.step), ("updates", state.updates)))
        state = state._replace(step=step, updates=updates)
    scale = engine.train_step.state_of(state, ScaleLoss)
    if scale is not None and "scale" in beside:
        moved = {k: beside["scale"][k].to(x.device) for k, x in scale._asdict().items()}
        state = engine.train_step.with_state(state, ScaleLoss(**moved))
    engine.state = state


def _check(name: str, saved: Mapping[str, Any], own: Client) -> None:
    wanted = {*own.scalars, *own.moments}
    found = {k for k, x in saved.items() if x is not None}
    if not wanted <= found:
        raise ValueError(
            f"load_state_dict: the saved state of parameter {name!r} has {sorted(found)}, and this optimizer keeps"
            f" {sorted(wanted)}; build the optimizer that it was"
        )
    for k, slots in own.moments.items():
        check_leaf(slots, name, torch.as_tensor(saved[k]))


def _client(engine: Engine) -> Client:
    own = engine.train_step.state_of(engine.state, Client)
    assert own is not None
    return own


def _numbers(groups: Any) -> list[Any]:
    """torch's numbers of parameters, or what a saved one has in their place."""
    held = [p for g in groups for p in g["params"]]
    return list(range(len(held))) if held and isinstance(held[0], Tensor) else held


def _packed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out, start = [], 0
    for g in groups:
        n = len(g["params"])
        out.append({**{k: v for k, v in g.items() if k != "params"}, "params": list(range(start, start + n))})
        start += n
    return out


def _trained(engine: Engine) -> Iterator[tuple[int, str, int]]:
    """(torch's number, name, leaf's number) of every parameter that the optimizer trains."""
    structure = engine.state.params.where.structure
    numbers: dict[str, int] = structure.unflatten(range(len(structure.leaves)))
    names = {id(p): n.removeprefix("module.") for n, p in reversed(list(engine.named_parameters()))}
    held = [p for g in engine.optimizer.param_groups for p in g["params"]]
    for i, p in enumerate(held):
        leaf = numbers[names[id(p)]]
        if not structure.frozen(leaf):
            yield i, structure.leaves[leaf].path, leaf

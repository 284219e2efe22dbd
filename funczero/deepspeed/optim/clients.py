"""A client's `torch.optim` optimizer inside the bracket: its arithmetic on this rank's rows, its state as a value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.number import number
from funczero.core.optimizer import Formula, GradientTransformation, Group, Reading
from funczero.deepspeed.optim.groups import ByGroup, Numbers, by_group
from funczero.layout.slots import Slots
from funczero.optim.from_torch import ELEMENTWISE
from funczero.optim.lift import same_when_cut

KNOWN = (*ELEMENTWISE, "SGD")
NEVER = {"LBFGS": "it runs the forward again inside its step", "SparseAdam": "gradients are dense here"}


class Client(NamedTuple):
    """The class's state by leaf; zeros until its first update, when the class makes it."""

    started: Tensor
    scalars: dict[str, Tensor]  # [leaves]
    moments: dict[str, Slots]
    rates: Any = ()


class ClientScalars(NamedTuple):
    """What one applied update takes beside the leaves: the groups as they are now, and the class's own numbers."""

    rows: list[Numbers]
    leaves: tuple[tuple[int, int], ...]  # (number, group) of those that are given
    factor: Tensor
    started: bool
    old: dict[str, Tensor]
    new: dict[str, Tensor]  # written by the step
    names: list[str]  # of the moments


def client_groups(client: torch.optim.Optimizer) -> list[Numbers]:
    """The numbers of a client's groups."""
    name = type(client).__name__
    if name in NEVER:
        raise TypeError(
            f"optimizer: torch.optim.{name} cannot work here: {NEVER[name]}; give torch.optim.AdamW(model.parameters())"
        )
    if any(float(x) > 0 for own in client.state.values() for k, x in own.items() if k == "step"):
        raise ValueError(
            f"optimizer: this {name} has taken steps already; "
            "hand it over before its first, and load a checkpoint with engine.load_checkpoint"
        )
    rows = [
        {k: _plain(v) for k, v in g.items() if k not in ("params", "initial_lr") and _numeric(v)}
        for g in client.param_groups
    ]
    names = [n for n in rows[0] if all(n in r for r in rows)]
    return [{n: r[n] for n in names} for r in rows]


def _numeric(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return bool(x) and all(map(_numeric, x))
    return isinstance(x, (int, float)) and not isinstance(x, bool) or isinstance(x, Tensor) and x.numel() == 1


def _plain(x: Any) -> Any:
    return tuple(map(float, x)) if isinstance(x, (tuple, list)) else float(x)


def client_optimizer(client: torch.optim.Optimizer, home: Mapping[str, int]) -> ByGroup:
    """A client's optimizer by groups.

    Law: the class's values on unsharded leaves. Its state is made at the first applied update, as there.

    Args:
      home: parameter name -> number of its group.

    Raises:
      TypeError: the class keeps state of another form than its parameters. Where leaves are cut, elsewhere: it is not
        known to work value by value.
    """
    ours = type(client).__module__.startswith(("torch.optim", "funczero."))
    known = ours and any(c.__name__ in KNOWN for c in type(client).__mro__)
    elementwise = known or _elementwise(client)
    eager = _eager(client)
    keys = _state_keys(client, eager)

    def init(params: Slots) -> Client:
        n = len(params.where.structure.leaves)
        scalars = {k: torch.zeros(n) for k in sorted({k for s, _ in keys for k in s})}
        return Client(
            torch.zeros((), dtype=torch.bool),
            scalars,
            {k: params.map(torch.zeros_like) for k in sorted({k for _, m in keys for k in m})},
        )

    def read(rows: list[Numbers], params: Slots) -> Reading:
        for i, row in enumerate(rows):
            number(f"{type(client).__name__}: param_groups[{i}]", "lr", row.get("lr", 0.0))
        leaves = sorted((i, group) for group, members in by_group(params, home).items() for i in members)
        return Reading(
            [Group((rows, tuple(leaves)), tuple(i for i, _ in leaves))],
            None,
            torch.tensor(rows[0]["lr"], dtype=torch.float64),
        )

    def scalars(state: Client, now: list[Any], factor: Tensor, ok: Tensor) -> tuple[Client, list[ClientScalars | None]]:
        if not bool(ok):
            return state, [None]
        ((rows, leaves),), new = now, {k: x.clone() for k, x in state.scalars.items()}
        moved = state._replace(started=torch.ones_like(state.started), scalars=new)
        return moved, [ClientScalars(rows, leaves, factor, bool(state.started), state.scalars, new, [*state.moments])]

    def leaf(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: ClientScalars | None) -> None:
        if s is not None:
            _stepped(client, (keys, eager), params, grads, moments, s)

    formula = Formula(_no_rates, lambda state: [*state.moments.values()], scalars, leaf, by_leaf=True)
    tx = GradientTransformation(init, _no_update, formula, type(client).__name__.lower(), elementwise=elementwise)
    return ByGroup(tx, read)


def _no_update(*args: Any) -> Any:
    raise NotImplementedError("a client's optimizer is only applied")


def _no_rates(*args: Any) -> Any:
    raise NotImplementedError("a client's rates are those of its groups")


def _stepped(
    client: Any, kinds: Any, params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: ClientScalars
) -> None:
    """The class's own step, in place on params, moments and s.new."""
    keys, eager = kinds
    ps = [torch.nn.Parameter(x.detach()) for x in params]
    groups = [[p for p, (_, group) in zip(ps, s.leaves, strict=True) if group == n] for n in range(len(s.rows))]
    own = _again(client, groups, s.rows)
    parts = (
        [dict(zip(s.names, each, strict=True)) for each in zip(*moments, strict=True)] if moments else [{} for _ in ps]
    )
    for p, g, part, (i, group) in zip(ps, grads, parts, s.leaves, strict=True):
        p.grad = g * s.factor.to(g.dtype)
        if s.started:
            scalars, like = keys[group]
            own.state[p] = {k: s.old[k][i].clone() for k in scalars} | {k: part[k] for k in like}
        elif eager[group]:
            own.state[p] = _first(eager[group], p)
    own.step()
    for p, part, (i, group) in zip(ps, parts, s.leaves, strict=True):
        for k in keys[group][0]:
            s.new[k][i] = own.state[p][k]
        for k in keys[group][1]:
            if part[k] is not own.state[p][k]:
                part[k].copy_(own.state[p][k])


def _again(client: Any, params: list[list[Any]], groups: list[Numbers]) -> Any:
    """The same optimizer over other parameters, without state; whatever wrapped the client's own step stays there."""
    own = object.__new__(type(client))
    own.__dict__.update({k: v for k, v in client.__dict__.items() if k != "step"})
    own.state = defaultdict(dict)
    cast = lambda old, new: int(new) if type(old) is int else list(new) if type(old) is list else new
    own.param_groups = [
        {**g, **{k: cast(g[k], v) for k, v in n.items()}, "params": ps}
        for g, n, ps in zip(client.param_groups, groups, params, strict=True)
    ]
    return own


def _eager(client: Any) -> list[dict[str, Tensor]]:
    """By group: the state that the class makes when it is built, as 0-d values. What is like the leaf has a dim."""
    out: list[dict[str, Tensor]] = []
    for g in client.param_groups:
        held = sorted((p for p in g["params"] if p in client.state), key=lambda p: -p.dim())
        like = {
            k
            for p in held[:1]
            for k, x in client.state[p].items()
            if isinstance(x, Tensor) and (x.dim() or not p.dim() and k != "step")
        }
        out.append(
            {
                k: x.detach().flatten()[:1] if k in like else x.detach().clone()
                for p in held[:1]
                for k, x in client.state[p].items()
                if isinstance(x, Tensor)
            }
        )
    return out


def _first(eager: Mapping[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    """The state that a leaf begins with."""
    return {k: torch.full_like(p.detach(), float(x)) if x.dim() else x.clone() for k, x in eager.items()}


def _state_keys(client: Any, eager: list[dict[str, Tensor]]) -> list[tuple[list[str], list[str]]]:
    """By group: what the class keeps as one number a leaf, and what is like the leaf."""
    out, groups = [], client_groups(client)
    for n in range(len(groups)):
        p = torch.nn.Parameter(torch.ones(2, 3))
        p.grad = torch.ones(2, 3)
        own = _again(client, [[p] if i == n else [] for i in range(len(groups))], groups)
        if eager[n]:
            own.state[p] = _first(eager[n], p)
        own.step()
        kept: dict[str, Any] = {
            k: x for k, x in own.state[p].items() if isinstance(x, (Tensor, int, float)) and not isinstance(x, bool)
        }
        odd = next((k for k, x in kept.items() if not isinstance(x, Tensor) or x.shape not in ((), p.shape)), None)
        if odd is not None:
            raise TypeError(
                f"optimizer: {type(client).__name__} keeps {odd!r} as no tensor like its parameter; "
                f"give one of torch.optim.{', '.join(KNOWN)}"
            )
        out.append(([k for k, x in kept.items() if not x.dim()], [k for k, x in kept.items() if x.dim()]))
    return out


def _elementwise(client: Any) -> bool:
    """Does an unknown class give the same values on rows of a leaf? Tried on small random leaves."""
    groups = client_groups(client)

    def init(params: dict[str, Tensor]) -> Any:
        ps = [torch.nn.Parameter(x.clone()) for x in params.values()]
        return ps, _again(client, [ps, *([] for _ in groups[1:])], groups)

    def update(grads: dict[str, Tensor], state: Any, params: dict[str, Tensor]) -> Any:
        ps, own = state
        for p, g in zip(ps, grads.values(), strict=True):
            p.grad = g
        own.step()
        return {n: p.detach() - old for p, (n, old) in zip(ps, params.items(), strict=True)}, state

    try:
        return same_when_cut(init, update)
    except (RuntimeError, ValueError, TypeError):
        return False

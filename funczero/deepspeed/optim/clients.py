"""A client's `torch.optim` optimizer inside the bracket: its own arithmetic on this rank's rows, with its state as a value."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.number import number
from funczero.core.types import GradientTransformation
from funczero.deepspeed.optim.groups import Group, Make
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


def client_groups(client: torch.optim.Optimizer) -> list[Group]:
    """The numbers of a client's groups."""
    name = type(client).__name__
    if name in NEVER:
        raise TypeError(f"optimizer: torch.optim.{name} cannot work here: {NEVER[name]}; give torch.optim.AdamW(model.parameters())")
    if any(float(x) > 0 for own in client.state.values() for k, x in own.items() if k == "step"):
        raise ValueError(f"optimizer: this {name} has taken steps already; hand it over before its first, and load a checkpoint with engine.load_checkpoint")
    rows = [{k: _plain(v) for k, v in g.items() if k not in ("params", "initial_lr") and _numeric(v)} for g in client.param_groups]
    names = [n for n in rows[0] if all(n in r for r in rows)]
    return [{n: r[n] for n in names} for r in rows]


def _numeric(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return bool(x) and all(map(_numeric, x))
    return isinstance(x, (int, float)) and not isinstance(x, bool) or isinstance(x, Tensor) and x.dim() == 0


def _plain(x: Any) -> Any:
    return tuple(map(float, x)) if isinstance(x, (tuple, list)) else float(x)


def client_optimizer(client: torch.optim.Optimizer, home: Mapping[str, int]) -> Make:
    """`make` for a client's optimizer. Law: the class's values on unsharded leaves; its state is made at the first applied update, as there.

    Args:
      home: parameter name -> number of its group.

    Raises:
      TypeError: the class keeps state of another form than its parameters; elsewhere, where leaves are cut: it is not known to work value by value.
    """
    known = type(client).__module__.startswith(("torch.optim", "funczero.")) and {c.__name__ for c in type(client).__mro__} & set(KNOWN)
    elementwise = bool(known) or _elementwise(client)
    eager = _eager(client)
    keys = _state_keys(client, eager)

    def make(groups: list[Group]) -> GradientTransformation:
        for i, g in enumerate(groups):
            number(f"{type(client).__name__}: param_groups[{i}]", "lr", g.get("lr", 0.0))

        def init(params: Slots) -> Client:
            n = len(params.where.structure.leaves)
            scalars = {k: torch.zeros(n) for k in sorted({k for s, _ in keys for k in s})}
            return Client(torch.zeros((), dtype=torch.bool), scalars, {k: params.map(torch.zeros_like) for k in sorted({k for _, m in keys for k in m})})

        def apply(params: Slots, grads: Slots, factor: Tensor, state: Client, ok: Tensor) -> tuple[Slots, Client, dict[str, Tensor]]:
            logs = {"lr": torch.tensor(groups[0]["lr"], dtype=torch.float64, device=ok.device)}
            if not bool(ok):
                return params, state, logs
            return params, _stepped(client, groups, home, (keys, eager), params, grads, factor, state), logs

        return GradientTransformation(init, _no_update, apply, type(client).__name__.lower(), elementwise)

    return make


def _no_update(*args: Any) -> Any:
    raise NotImplementedError("a client's optimizer is only applied")


def _stepped(client: Any, groups: list[Group], home: Mapping[str, int], kinds: Any, params: Slots, grads: Slots, factor: Tensor, state: Client) -> Client:
    """The class's own step, in place on params and moments."""
    keys, eager = kinds
    structure = params.where.structure
    mine = [(i, x) for i, x in enumerate(params.leaves()) if x is not None and not structure.frozen(i)]
    group_of = {i: home[structure.leaves[i].path] for i, _ in mine}
    gs, moments = grads.leaves(), {k: m.leaves() for k, m in state.moments.items()}
    ps = {i: torch.nn.Parameter(x.detach()) for i, x in mine}
    own = _again(client, [[p for i, p in ps.items() if group_of[i] == n] for n in range(len(groups))], groups)
    for i, p in ps.items():
        g = gs[i]
        assert g is not None
        p.grad = g * factor.to(g.dtype)
        if bool(state.started):
            scalars, like = keys[group_of[i]]
            own.state[p] = {k: state.scalars[k][i].clone() for k in scalars} | {k: moments[k][i] for k in like}
        elif eager[group_of[i]]:
            own.state[p] = _first(eager[group_of[i]], p)
    own.step()
    scalars = {k: x.clone() for k, x in state.scalars.items()}
    for i, p in ps.items():
        for k in keys[group_of[i]][0]:
            scalars[k][i] = own.state[p][k]
        for k in keys[group_of[i]][1]:
            place, now = moments[k][i], own.state[p][k]
            if place is not now and place is not None:
                place.copy_(now)
    return Client(torch.ones_like(state.started), scalars, state.moments)


def _again(client: Any, params: list[list[Any]], groups: list[Group]) -> Any:
    """The same optimizer over other parameters, without state; whatever wrapped the client's own step stays there."""
    own = object.__new__(type(client))
    own.__dict__.update({k: v for k, v in client.__dict__.items() if k != "step"})
    own.state = defaultdict(dict)
    cast = lambda old, new: int(new) if type(old) is int else list(new) if type(old) is list else new
    own.param_groups = [{**g, **{k: cast(g[k], v) for k, v in n.items()}, "params": ps} for g, n, ps in zip(client.param_groups, groups, params, strict=True)]
    return own


def _eager(client: Any) -> list[dict[str, Tensor]]:
    """By group: the state that the class makes when it is built, as 0-d values; what is like the leaf is tagged by a dim."""
    out: list[dict[str, Tensor]] = []
    for g in client.param_groups:
        held = sorted((p for p in g["params"] if p in client.state), key=lambda p: -p.dim())
        like = {k for p in held[:1] for k, x in client.state[p].items() if isinstance(x, Tensor) and (x.dim() or not p.dim() and k != "step")}
        out.append({k: x.detach().flatten()[:1] if k in like else x.detach().clone() for p in held[:1] for k, x in client.state[p].items() if isinstance(x, Tensor)})
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
        kept: dict[str, Any] = {k: x for k, x in own.state[p].items() if isinstance(x, (Tensor, int, float)) and not isinstance(x, bool)}
        odd = next((k for k, x in kept.items() if not isinstance(x, Tensor) or x.shape not in ((), p.shape)), None)
        if odd is not None:
            raise TypeError(f"optimizer: {type(client).__name__} keeps {odd!r} as no tensor like its parameter; give one of torch.optim.{', '.join(KNOWN)}")
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
        return {n: (p.detach() - old) for p, (n, old) in zip(ps, params.items(), strict=True)}, state

    try:
        return same_when_cut(init, update)
    except (RuntimeError, ValueError, TypeError):
        return False

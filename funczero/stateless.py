"""Any `torch.nn.Module` as a pure loss function of a flat dict of parameters, with ZeRO-3 per block inside the module's own loop.

The module is never touched. A snapshot of its tree is taken once, without parameters; every call runs on a fresh copy of it, where each
repeated block has a `forward` of ours: it opens its unit at the seam (layers.py), binds the parameters, runs, and lets them go.
"""
from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funczero import rng, tree
from funczero.layers import group_of, run_block, run_unit
from funczero.tape import Ref


def stateless(module: nn.Module, loss: Callable[..., Any], units: Sequence[str] | None = None, remat: bool = False) -> tuple[Callable, dict[str, Tensor]]:
    """(loss_fn, params): a module as a pure loss over {dotted name: tensor}; its repeated blocks are units, gathered one by one.

    The values are the module's own. value_and_grad reads `loss_fn.units`; `loss_fn.trainable` tells which paths require grad (None: all).
    What a forward draws is a function of the key of value_and_grad(loss_fn, rng=True) and of its place; without a key drawing is
    refused. Tied parameters are one tensor. Given whole tensors, outside of any step, loss_fn is a plain function.

    >>> loss_fn, params = stateless(nn.Linear(2, 1, bias=False), lambda model, x: (model(x).sum(), torch.tensor(float(len(x)))))
    >>> [x.item() for x in loss_fn({"weight": torch.ones(1, 2)}, torch.ones(3, 2))], list(params)
    ([6.0, 3.0], ['weight'])

    Args:
      module: read once, now, with its training mode and buffers; to evaluate write another, stateless(module.eval(), loss). Buffers
        follow the parameters' device; a forward that changes one, as batch norm in training, is refused.
      loss: loss(model, batch) -> (sum, weight); model is called like the module.
      units: paths of lists of blocks, as "transformer.h"; () for none. By default the lists (ModuleList, ModuleDict, Sequential) of one type.
      remat: save only each block's inputs and run it again in the backward; so does a block that has gradient_checkpointing set.

    Raises:
      ValueError: units names no list of blocks, or the module has no values (meta).
    """
    meta = next((n for n, p in [*module.named_parameters(), *module.named_buffers()] if p.is_meta), None)
    if meta is not None:
        raise ValueError(f"stateless: {meta!r} is on the meta device and has no values; write module.to_empty(device=...) and load them first")
    snapshot = _Snapshot(module, _lists(module, units), remat)

    def loss_fn(params: dict[str, Any], batch: Any, key: int | None = None) -> Any:
        call = _Call(snapshot, params, key is not None)
        copies = call.bound(snapshot)
        versions = [x._version for _, x in snapshot.buffers]
        with _scope(key, call.device, lambda: _drew(snapshot.root, "", tuple(f"{u.path}." for u in snapshot.units))):
            result = loss(copies[id(snapshot.root)], batch)
        _check_buffers(copies, snapshot.buffers, versions)
        ports = [x for t in {r.tape for r in params.values() if isinstance(r, Ref)} for x in (t.port, *t.leaves.values())]  # stand for what is closed
        snapshot.check_leaves("", result, [*tree.tensors((params, batch)), *ports])
        return result

    frozen, once = snapshot.frozen, dict[int, Tensor]()
    loss_fn.units, loss_fn.trainable = snapshot.lists, (lambda path: path not in frozen) if frozen else None  # type: ignore[attr-defined]
    first = {id(p): n for n, p in module.named_parameters()}
    names = module.named_parameters(remove_duplicate=False)
    loss_fn.ties = {n: first[id(p)] for n, p in names if first[id(p)] != n}  # type: ignore[attr-defined]
    return loss_fn, {n: once.setdefault(id(p), p.detach()) for n, p in module.named_parameters(remove_duplicate=False)}


def _lists(module: nn.Module, units: Sequence[str] | None) -> tuple[str, ...]:
    """The lists named, or those found: of nested ones (stages of blocks, blocks of experts) the outer or the inner, whichever holds less."""
    modules = dict(module.named_modules())
    found = [path for path, m in modules.items() if path and isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and _alike(list(m.children()))]
    outer = tuple(p for p in found if not any(p.startswith(f"{q}.") for q in found))
    inner = tuple(p for p in found if not any(q.startswith(f"{p}.") for q in found))

    def held(lists: tuple[str, ...]) -> int:  # the rest and two units, less a constant
        sizes = [sum(p.numel() for p in b.parameters()) for path in lists for b in modules[path].children()]
        return 2 * max(sizes) - sum(sizes)
    if units is None:
        return min(outer, inner, key=held) if found else ()
    units = (units,) if isinstance(units, str) else tuple(units)
    for u in units:
        blocks = list(modules[u].children()) if u in modules else []
        if not any(list(b.parameters()) for b in blocks) or list(modules[u].parameters(recurse=False)):
            raise ValueError(f"stateless: units={u!r} names no list of blocks in {type(module).__name__}; its repeated lists are {found}")
    return units


def _alike(bs: list[nn.Module]) -> bool:
    """Are these repeated blocks? Bare layers of torch.nn are not: a list of them is as often read as called."""
    blocks = all(list(b.parameters()) and (list(b.children()) or not type(b).__module__.startswith("torch.nn.")) for b in bs)
    return blocks and len({type(b) for b in bs}) == 1 < len(bs)


# --- the snapshot -----------------------------------------------------------------------------------------------------
Slot = tuple[int, str, Any, str]  # module (its id in the snapshot), box, key, name: the place of a tensor is getattr(module, box)[key]


class _Unit(NamedTuple):
    path: str
    module: int  # its id in the snapshot
    slots: list[Slot]
    again: bool  # run again in the backward


class _Snapshot:
    """The tree of modules as it was: attributes, copies of buffers, and instead of parameters the places where they belong."""

    def __init__(self, module: nn.Module, lists: tuple[str, ...], remat: bool) -> None:
        copies, named = _copies(_wiring(module)), list(module.named_parameters(remove_duplicate=False))
        self.root, self.lists, self.sound = copies[id(module)], lists, set[str]()
        self.names, self.frozen = {n for n, _ in named}, {n for n, p in named if not p.requires_grad}
        self.slots: list[Slot] = []
        self.buffers: list[tuple[Slot, Tensor]] = []
        first, kept = {id(p): n for n, p in reversed(named)}, dict[int, Tensor]()
        for path, original in module.named_modules():
            for (m, box, key, name), x in _tensors(copies[id(original)], path):
                if id(x) in first:  # in _parameters, or in a list, as an RNN keeps them
                    self.slots.append((m, box, key, name if box == "_parameters" else first[id(x)]))
                else:
                    self.buffers.append(((m, box, key, name), kept.setdefault(id(x), x.detach().clone())))
        self.units = self._units(module, copies, remat)
        self.wiring = _wiring(self.root, nn.Module().__dict__.keys() - {"_parameters", "_buffers", "_modules"})
        for held, key, _ in _places(self.slots, {id(m): m for m in copies.values()}):
            held[key] = None  # the snapshot keeps no parameter alive

    def _units(self, module: nn.Module, copies: dict[int, nn.Module], remat: bool) -> list[_Unit]:
        found: dict[int, _Unit] = {}
        for path in self.lists:
            above = [module, *(module.get_submodule(path[:i]) for i, c in enumerate(path) if c == ".")]
            for name, block in module.get_submodule(path).named_children():
                inside = {id(copies[id(m)]) for m in block.modules()}
                asking = [copies[id(m)] for m in (*above, *block.modules()) if getattr(m, "gradient_checkpointing", False) is True and m.training]
                for m in asking:
                    m.__dict__["gradient_checkpointing"] = False  # the seam does it
                m = copies[id(block)]
                found.setdefault(id(m), _Unit(f"{path}.{name}", id(m), [s for s in self.slots if s[0] in inside], remat or bool(asking)))
        return list(found.values())

    def check_leaves(self, path: str, result: Any, own: list[Tensor]) -> None:
        """Refuse a graph that ends in a leaf of which nobody would hear, for its gradient would be lost; walked once a path."""
        if path in self.sound or not torch.is_grad_enabled():
            return
        known, seen = {id(x) for x in own}, {x.grad_fn for x in own}
        todo = [x.grad_fn for x in tree.tensors(result) if x.grad_fn is not None and x.grad_fn not in seen]
        while todo:
            node = todo.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                who = f"unit {path!r}, which runs again in the backward (remat)," if path else "the forward"
                what = f"reads a tensor of shape {tuple(leaf.shape)} that needs a gradient but is neither a parameter nor an argument of it"
                raise TypeError(f"stateless: {who} {what}, so its gradient would be lost; register it as a parameter there, or hand it in")
            seen.add(node)
            todo += [n for n, _ in node.next_functions if n is not None and n not in seen]
        self.sound.add(path)


def _tensors(m: nn.Module, path: str) -> list[tuple[Slot, Tensor]]:
    """Every tensor among a module's attributes and in their containers."""
    boxes = [("__dict__", m.__dict__), *((k, v) for k, v in m.__dict__.items() if type(v) in (dict, OrderedDict, list))]
    pairs = [(box, key, x) for box, held in boxes for key, x in (enumerate(held) if type(held) is list else held.items()) if isinstance(x, Tensor)]
    return [((id(m), box, key, f"{path}.{key}".lstrip(".")), x) for box, key, x in pairs]


def _wiring(root: nn.Module, apart: Iterable[str] = ()) -> list[tuple[nn.Module, list[str]]]:
    """Every module, with the attributes that its copy may not share: containers, and what refers to other modules."""
    return [(m, [k for k, v in m.__dict__.items() if k not in apart and isinstance(v, (dict, list, MethodType, partial, nn.Module))]) for m in root.modules()]


def _copies(wiring: list[tuple[nn.Module, list[str]]]) -> dict[int, nn.Module]:
    """A copy of every module, by the original's id: attributes and containers of its own, the same tensors, wired among themselves."""
    memo = {id(m): object.__new__(type(m)) for m, _ in wiring}
    for m, names in wiring:
        own = memo[id(m)].__dict__
        own.update(m.__dict__)
        for name in names:
            v, kind = own[name], type(own[name])
            if kind is dict or kind is OrderedDict:
                own[name] = kind((k, _wired(x, memo)) for k, x in v.items()) if v else kind()
            else:
                own[name] = [_wired(x, memo) for x in v] if kind is list else _wired(v, memo)
    return memo


def _wired(x: Any, memo: dict[int, nn.Module]) -> Any:
    """A value among the copies: modules and what is bound to them are the copies' own."""
    if isinstance(x, nn.Module):
        return memo.get(id(x), x)
    if type(x) is MethodType:
        return MethodType(x.__func__, _wired(x.__self__, memo))
    return partial(_wired(x.func, memo), *(_wired(a, memo) for a in x.args), **x.keywords) if type(x) is partial else x


# --- one call ---------------------------------------------------------------------------------------------------------
class _Call:
    """One forward. Its copies of the blocks hold it, and never the other way: a cycle would keep gathered memory until a collection."""

    def __init__(self, snapshot: _Snapshot, params: dict[str, Any], keyed: bool | None) -> None:
        """keyed: draws come from a key; None: from torch's generator, as the caller's loop has it."""
        if not isinstance(params, dict) or params.keys() != snapshot.names:
            odd = f"differ in {sorted(snapshot.names ^ params.keys())[0]!r}" if isinstance(params, dict) else f"are a {type(params).__name__}"
            raise ValueError(f"stateless: the parameters {odd}; give a flat dict with the names of the one that stateless returned")
        taught = next((n for n in snapshot.frozen if params[n].requires_grad), None)
        if taught is not None:
            remedy = "write value_and_grad(loss_fn, trainable=loss_fn.trainable, ...), or module.requires_grad_() before fz.stateless"
            raise TypeError(f"stateless: parameter {taught!r} is frozen in the module (requires_grad=False) but is differentiated here; {remedy}")
        self.units, self.check_leaves, self.params, self.keyed = snapshot.units, snapshot.check_leaves, params, keyed
        self.device = next((x.device for x in params.values()), torch.device("cpu"))
        self.groups = [group_of([params[name] for *_, name in u.slots]) for u in self.units]

    def bound(self, snapshot: _Snapshot) -> dict[int, nn.Module]:
        """A fresh copy of the modules, with parameters in their places; units are closed until they run."""
        copies = _copies(snapshot.wiring)
        snapshot.buffers = [(slot, x.to(self.device)) for slot, x in snapshot.buffers]
        for (m, box, key, _), x in snapshot.buffers:
            getattr(copies[m], box)[key] = x
        _bind(_places(snapshot.slots, copies), self.params)
        for i, unit in enumerate(self.units):
            block = copies[unit.module]
            block.__dict__["forward"] = partial(self.run, i, weakref.ref(block), _places(unit.slots, copies), block.__dict__.get("forward"))
        return copies

    def run(self, i: int, block: Any, places: list[Any], forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Unit i: opened, bound, run, closed. Its seed is drawn at its place in the forward, so that running it again repeats it."""
        unit, groups, module = self.units[i], self.groups, block()
        seed = rng.fold(int(torch.randint(2**62, ())), unit.path) if self.keyed else None
        closed = {name: self.params[name] for _, _, name in places}
        around = (groups[i - 1] if i else (), groups[i + 1] if i + 1 < len(groups) else ())

        def once(own: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            _bind(places, own)
            try:
                with nullcontext() if self.keyed is None else _scope(seed, self.device, lambda: _drew(module, f"{unit.path}.")):
                    return (forward or partial(type(module).forward, module))(*args, **kwargs)
            finally:
                _bind(places, self.params)

        def twice(own: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = [(x, x._version) for x in tree.tensors((args, kwargs))]
            out = once(own, args, kwargs)
            if any(x._version != version for x, version in before):
                why = "changes an input in place; write x = x + y, or leave out remat"
                raise RuntimeError(f"stateless: unit {unit.path!r} runs again in the backward (remat), but {why}")
            self.check_leaves(unit.path, out, [*own.values(), *(x for x, _ in before)])
            return out
        if unit.again and torch.is_grad_enabled():
            return run_block(twice, tree.flatten(closed), groups[i], _repeatable(unit.path, args, kwargs), {}, around, True)
        tape = next((r.tape for r in closed.values() if isinstance(r, Ref)), None)
        opened = lambda leaves: once({n: leaves[r.leaf] if isinstance(r, Ref) else r for n, r in closed.items()}, args, kwargs)
        return opened({}) if tape is None else run_unit(tape, groups[i], opened, *around)


def _places(slots: Sequence[Slot], copies: dict[int, nn.Module]) -> list[tuple[Any, Any, str]]:
    return [(getattr(copies[m], box), key, name) for m, box, key, name in slots]


def _bind(places: list[tuple[Any, Any, str]], values: dict[str, Any]) -> None:
    for held, key, name in places:
        held[key] = values[name]


def _check_buffers(copies: dict[int, nn.Module], buffers: list[tuple[Slot, Tensor]], versions: list[int]) -> None:
    """Refuse what would be forgotten: a changed buffer. One outside the state_dict may be replaced on the copy."""
    for ((m, box, key, name), x), version in zip(buffers, versions, strict=True):
        module = copies[m]
        lasting = box == "_buffers" and key not in module._non_persistent_buffers_set
        if x._version != version or lasting and module._buffers.get(key) is not x:
            remedy = "write fz.stateless(module.eval(), ...), or use a layer without running state (BatchNorm: track_running_stats=False)"
            raise RuntimeError(f"stateless: the forward of {type(module).__name__} changes buffer {name!r}, but a pure loss has nowhere to keep it; {remedy}")


def _repeatable(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Arguments without empty key-value caches, which a block that runs twice would fill twice; other objects are refused."""
    empty = lambda x: callable(getattr(x, "get_seq_length", None)) and int(x.get_seq_length()) == 0
    both = tuple(None if empty(x) else x for x in args), {k: False if k == "use_cache" else None if empty(x) else x for k, x in kwargs.items()}
    odd = next((x for x in tree.leaves(both) if hasattr(x, "__dict__") and not isinstance(x, Tensor) and not callable(x)), None)
    if odd is not None:
        why = f"it is handed a {type(odd).__name__}, which may change in between or hold tensors that need a gradient; leave that out, or leave out remat"
        raise TypeError(f"stateless: unit {path!r} runs again in the backward (remat), but {why}")
    return both


@contextmanager
def _scope(key: int | None, device: torch.device, drew: Callable[[], Exception]) -> Iterator[None]:
    """What torch draws in here comes from the key alone; without a key nothing may be drawn. The generators are left as they were."""
    here = (torch.default_generator, *([torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []))
    generators = [(g, g.get_state()) for g in here]
    try:
        for g, _ in generators if key is not None else ():
            g.manual_seed(key)  # type: ignore[arg-type]
        yield
        if key is None and not all(torch.equal(g.get_state(), state) for g, state in generators):
            raise drew()
    finally:
        for g, state in generators:
            g.set_state(state)


def _drew(m: nn.Module, path: str, apart: tuple[str, ...] = ()) -> Exception:
    """Who drew random numbers, as far as can be told: the first active dropout layer that is not inside what stands apart."""
    active = {path + n: x for n, x in m.named_modules() if isinstance(x, nn.modules.dropout._DropoutNd) and x.training and x.p > 0}
    who = next((n for n in active if not n.startswith(apart)), "")
    what = f"{who!r} ({type(active[who]).__name__}, p={active[who].p})" if who else f"the forward of {path.rstrip('.') or type(m).__name__!r}"
    remedy = "write value_and_grad(loss_fn, ..., rng=True), or fz.stateless(module.eval(), ...) where nothing should be dropped"
    return RuntimeError(f"stateless: {what} draws from torch's global generator, so the loss would not be a function of its arguments; {remedy}")

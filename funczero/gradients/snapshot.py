"""A tree of modules as it was at one moment: attributes, copies of buffers, and instead of parameters the places where
they belong.

Every call runs on fresh copies of it, with attributes, containers and hooks of their own, so that nothing that a
forward leaves on a module is there for the next call: what would be missed is refused by name (`Changes`).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from absl import logging
from torch import Tensor, nn

from funczero.core import tree
from funczero.gradients.buffers import computed

# module (its id in the snapshot), box, key, name: the place of a tensor is getattr(module, box)[key]
Slot = tuple[int, str, Any, str]
Wiring = list[tuple[nn.Module, list[str]]]
STANDARD = frozenset(nn.Module().__dict__)  # attributes that every module has


class Unit(NamedTuple):
    """A block that is opened by itself."""

    path: str
    module: int  # its id in the snapshot
    slots: list[Slot]
    inside: frozenset[int]  # its modules
    again: bool  # run again in the backward


class Snapshot:
    """See the module's docstring. Its own modules are never run."""

    def __init__(self, module: nn.Module, lists: tuple[str, ...], remat: bool) -> None:
        """lists: paths of lists of blocks, each block a unit."""
        copies, named = copied(_wiring(module)), list(module.named_parameters(remove_duplicate=False))
        self.root, self.lists, self.sound = copies[id(module)], lists, set[str]()
        self.names, self.frozen = {n for n, _ in named}, {n for n, p in named if not p.requires_grad}
        first, kept = {id(p): n for n, p in reversed(named)}, dict[int, Tensor]()
        self.ties = {n: first[id(p)] for n, p in named if first[id(p)] != n}  # second name -> first name
        self.originals = {n: weakref.ref(p) for n, p in named}
        self.slots: list[Slot] = []
        self.buffers: list[tuple[Slot, Tensor]] = []
        for path, original in module.named_modules():
            for (m, box, key, name), x in _tensors(copies[id(original)], path):
                if id(x) in first:  # in _parameters, or in a list, as an RNN keeps them
                    self.slots.append((m, box, key, name if box == "_parameters" else first[id(x)]))
                else:
                    self.buffers.append(((m, box, key, name), kept.setdefault(id(x), x.detach().clone())))
        known: dict[int, str] = {}
        self.named = [known.setdefault(id(x), slot[3]) for slot, x in self.buffers]  # by their first names
        self.computed = computed(module)
        _uncompiled(copies.values())
        _dense(copies.values())
        self.units = self._units(module, copies, remat)
        self.changes = Changes({path: copies[id(m)] for path, m in module.named_modules()})
        self.wiring = _wiring(self.root)
        for held, key, _ in places(self.slots, {id(m): m for m in copies.values()}):
            held[key] = None  # the snapshot keeps no parameter alive

    def _units(self, module: nn.Module, copies: dict[int, nn.Module], remat: bool) -> list[Unit]:
        found: dict[int, Unit] = {}
        for path in self.lists:
            above = [module, *(module.get_submodule(path[:i]) for i, c in enumerate(path) if c == ".")]
            for name, block in module.get_submodule(path).named_children():
                inside = frozenset(id(copies[id(m)]) for m in block.modules())
                members = [copies[id(m)] for m in (*above, *block.modules())]
                asking = [m for m in members if getattr(m, "gradient_checkpointing", False) is True and m.training]
                for m in asking:
                    m.__dict__["gradient_checkpointing"] = False  # the seam does it
                m = copies[id(block)]
                found.setdefault(
                    id(m),
                    Unit(
                        f"{path}.{name}",
                        id(m),
                        [s for s in self.slots if s[0] in inside],
                        inside,
                        remat or bool(asking),
                    ),
                )
        return list(found.values())

    def shared(self) -> list[Any]:
        """What its modules have in common with the world around them: objects among their attributes, and classes."""
        found: dict[int, Any] = {id(type(m)): type(m) for m, _ in self.wiring}
        own = {id(m) for m, _ in self.wiring}
        for m, _ in self.wiring:
            for v in m.__dict__.values():
                # copies have lists and dicts of their own, but not those of somebody's class
                inside = v if type(v) is list else v.values() if type(v) in (dict, OrderedDict) else (v,)
                for x in inside:
                    if not isinstance(x, (Tensor, str, int, float, type(None))) and id(x) not in own:
                        found[id(x)] = x
        return list(found.values())

    def check_leaves(self, path: str, result: Any, own: list[Tensor]) -> None:
        """Refuse a graph that ends in a leaf whose gradient would be lost; walked once a path ("" is the whole
        forward).

        A leaf that the forward makes for itself loses nothing. One of the module's own parameters was reached past the
        copies. In a unit that runs again every leaf from outside is lost, whoever made it.
        """
        if path in self.sound or not torch.is_grad_enabled():
            return
        for leaf in _leaves(result, own):
            name = next((n for n, ref in self.originals.items() if ref() is leaf), None)
            if name is not None:
                why = (
                    f"reads parameter {name!r} of the module that stateless was given, and not of its copy, so its"
                    " gradient would be lost"
                )
                raise TypeError(
                    f"stateless: the forward {why}; a wrapped forward or a closure holds that module: take it off first"
                )
            if path:
                why = (
                    f"reads a tensor of shape {tuple(leaf.shape)} that needs a gradient and comes from outside of it,"
                    " so its gradient would be lost"
                )
                raise TypeError(
                    f"stateless: unit {path!r}, which runs again in the backward (remat), {why}; hand it in, or leave"
                    " out remat"
                )
        self.sound.add(path)


class Changes:
    """What a forward leaves on its modules beside buffers.

    Caches, which each call makes anew, are said once. A number that a first forward sets, and a second one leaves
    alone, is a setting (a window that is no wider than the image): it is kept, and said. One that moves again is a
    state, and refused.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """modules: the snapshot's, by path."""
        self.modules = {id(m): m for m in modules.values()}
        self.settled: set[tuple[int, str]] = set()
        self.paths = {id(m): path for path, m in reversed(modules.items())}
        self.numbers: list[tuple[int, str, Any]] = []
        self.contents: list[tuple[int, str, Any]] = []  # containers that every copy has for itself
        self.shared: list[tuple[int, str, Any]] = []  # containers that all copies share
        self.names: list[tuple[int, frozenset[str]]] = []
        self.said: set[str] = set()
        for m in modules.values():
            for key, v in m.__dict__.items():
                if key not in STANDARD:
                    kind = self._kind(v)
                    if kind is not None:
                        kind.append((id(m), key, v))
            self.names.append((id(m), frozenset(m.__dict__)))

    def _kind(self, v: Any) -> list[tuple[int, str, Any]] | None:
        if v is None or isinstance(v, (int, float, complex)):
            return self.numbers
        if type(v) in (dict, OrderedDict, list):
            return self.contents
        return self.shared if isinstance(v, (set, deque, dict, list, bytearray)) else None

    def lengths(self) -> list[int]:
        """Of the containers that all copies share, before a call."""
        return [len(v) for *_, v in self.shared]

    def check(self, copies: dict[int, nn.Module], before: list[int]) -> bool:
        """Refuse what the next call would not see; say new attributes once. True: settings were made, and the forward
        has to run on them.

        Args:
          copies: the call's modules, by the snapshot's ids.
          before: `lengths` at its beginning.
        """
        moved = []
        for i, (m, key, old) in enumerate(self.numbers):
            new = copies[m].__dict__.get(key)
            if new is not old and not (type(new) is type(old) and new == old):
                if old is None or isinstance(old, bool):  # how a cache is marked as made
                    self._say(m, key)
                elif (m, key) in self.settled or not isinstance(new, (int, float, complex)):
                    raise self._refused(m, key, f"from {old!r} to {new!r}")
                else:
                    moved.append((i, new))
        for m, key, old in self.contents:
            new = copies[m].__dict__.get(key)
            if not isinstance(new, type(old)) or len(new) != len(old) or _numbers(new) != _numbers(old):
                self._say(m, key)
        for (m, key, v), n, now in zip(self.shared, before, self.lengths(), strict=True):
            if n != now:
                raise self._refused(m, key, f"a {type(v).__name__} of {n} values, now {now}, which all calls share")
        for m, names in self.names:
            if len(copies[m].__dict__) > len(names):
                for key in copies[m].__dict__.keys() - names - {"forward"}:
                    self._say(m, key)

        for i, new in moved:
            m, key, old = self.numbers[i]
            logging.warning(
                "stateless: the forward sets %r from %r to %r, which is kept; should it move again, it is refused",
                self._name(m, key),
                old,
                new,
            )
            self.settled.add((m, key))
            self.numbers[i] = (m, key, new)
            self.modules[m].__dict__[key] = new
        return bool(moved)

    def _refused(self, m: int, key: str, what: str) -> RuntimeError:
        why = f"the forward changes {self._name(m, key)!r} ({what}), but a pure loss has nowhere to keep it"
        return RuntimeError(f"stateless: {why}; hand it in with the batch, or return it as aux")

    def _say(self, m: int, key: str) -> None:
        name = self._name(m, key)
        if name not in self.said:
            self.said.add(name)
            logging.warning("stateless: what the forward keeps in %r is forgotten after every call", name)

    def _name(self, m: int, key: str) -> str:
        return f"{self.paths[m]}.{key}".lstrip(".")


def _numbers(box: Any) -> list[Any]:
    return [x for x in (box if isinstance(box, list) else box.values()) if isinstance(x, (int, float, complex))]


def _leaves(result: Any, own: list[Tensor]) -> list[Tensor]:
    """Tensors that the graph of a result ends in, but for those known."""
    known, seen, out = {id(x) for x in own}, {x.grad_fn for x in own}, []
    todo = [x.grad_fn for x in tree.tensors(result) if x.grad_fn is not None and x.grad_fn not in seen]
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            out.append(leaf)
        seen.add(node)
        todo += [n for n, _ in node.next_functions if n is not None and n not in seen]
    return out


def _tensors(m: nn.Module, path: str) -> list[tuple[Slot, Tensor]]:
    """Every tensor among a module's attributes and in their containers."""
    boxes = [("__dict__", m.__dict__), *((k, v) for k, v in m.__dict__.items() if type(v) in (dict, OrderedDict, list))]
    pairs = [
        (box, key, x)
        for box, held in boxes
        for key, x in (enumerate(held) if type(held) is list else held.items())
        if isinstance(x, Tensor)
    ]
    return [((id(m), box, key, f"{path}.{key}".lstrip(".")), x) for box, key, x in pairs]


def _wiring(root: nn.Module) -> Wiring:
    """Every module, with the attributes that its copy may not share: containers, hooks, and what refers to other
    modules.
    """
    return [
        (m, [k for k, v in m.__dict__.items() if isinstance(v, (dict, list, MethodType, partial, nn.Module))])
        for m in root.modules()
    ]


def copied(wiring: Wiring) -> dict[int, nn.Module]:
    """A copy of every module, by the original's id: attributes, containers and hooks of its own, the same tensors,
    wired among themselves.
    """
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


def _uncompiled(modules: Iterable[nn.Module]) -> None:
    """torch.compile's callables hold the module that they were made of; copies run their own forward, uncompiled."""
    found = False
    for m in modules:
        original = m.__dict__.get("_modules", {}).get("_orig_mod")
        if original is not None and "dynamo_ctx" in m.__dict__:
            m.__dict__["forward"], found = original.__call__, True
        if m.__dict__.get("_compiled_call_impl") is not None:
            m.__dict__["_compiled_call_impl"], found = None, True
    if found:
        logging.warning(
            "stateless: torch.compile is taken off, because what it made runs on the module that it was given; blocks"
            " run uncompiled"
        )


def _dense(modules: Iterable[nn.Module]) -> None:
    """Gradients are added and cut as dense rows; copies ask for no other."""
    sparse = [m for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    for m in sparse:
        m.__dict__["sparse"] = False
    if sparse:
        logging.warning(
            "stateless: sparse=True is taken off %d embeddings: their gradients are dense here", len(sparse)
        )


def places(slots: Sequence[Slot], copies: dict[int, nn.Module]) -> list[tuple[Any, Any, str]]:
    """(box, key, parameter's name) of slots on one call's copies."""
    return [(getattr(copies[m], box), key, name) for m, box, key, name in slots]

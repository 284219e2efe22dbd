"""What a module says itself of its blocks: `_fsdp_plan` and `_no_split_modules`, as transformers writes them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from funczero.gradients.units import LISTS

PLAN, CLASSES = "_fsdp_plan", "_no_split_modules"


class Planned(NamedTuple):
    """Units that a module names, and in words which and why."""

    units: tuple[str, ...]
    words: str


def planned(module: nn.Module) -> Planned:
    """The lists of blocks that a module names: by path in its `_fsdp_plan`, or else by class in `_no_split_modules`.

    A plan's key is the path of a module, in which * stands for one name, as "model.layers.*", or a tuple of such paths.
    What is named outside of any list (embeddings, a norm, a head) is gathered with the rest; of blocks inside one
    another the outer ones count. The plan in which transformers' configurations begin says "layers.*" of every model,
    whatever it calls its blocks: where no key names a block, the classes count.

    Raises:
      ValueError: no block is named; a path that the class itself states names nothing; a list has blocks that are not
        named, or lists in their place.

    >>> class Net(nn.Module):
    ...     _no_split_modules = ["Block"]
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.blocks = nn.ModuleList([Block(2, 2), Block(2, 2)])
    >>> class Block(nn.Linear):
    ...     pass
    >>> planned(Net()).units
    ('blocks',)
    """
    modules, who = dict(module.named_modules(remove_duplicate=False)), type(module).__name__
    keys, own = _keys(getattr(module, PLAN, None)), _keys(getattr(type(module), PLAN, None))
    classes = sorted(getattr(module, CLASSES, None) or ())
    paths = {k: [p for p in modules if p and re.fullmatch(re.escape(k).replace(r"\*", r"[^.]+"), p)] for k in keys}
    odd = next((k for k in own if not paths[k]), None) if set(own) <= set(keys) else None
    if odd is not None:
        why = f"states {odd!r}, which names no module"
        raise ValueError(f"stateless: {PLAN} of {who} {why}; correct it, or write units=(...)")
    for by, named in ((PLAN, paths), (CLASSES, {c: [p for p, m in modules.items() if _is(m, c)] for c in classes})):
        blocks = [p for found in named.values() for p in found if _listed(p, modules)]
        if blocks:
            units = _lists(who, by, blocks, modules)
            idle = [k for k, found in named.items() if not found and (by == CLASSES or "*" in k)]
            return Planned(units, _words(by, units, idle, modules))
    said = f"it has neither {PLAN} nor {CLASSES}"
    if keys or classes:
        said = f"{PLAN} {keys} and {CLASSES} {classes} name none in a list"
    remedy = "write units=(...), or leave it out, and lists of blocks are looked for"
    raise ValueError(f"stateless: units='auto' asks {who} for its blocks, but {said}; {remedy}")


def _keys(plan: Any) -> list[str]:
    keys = plan if isinstance(plan, Mapping) else ()
    return [k for key in keys for k in (key if isinstance(key, tuple) else (key,)) if isinstance(k, str)]


def _is(m: nn.Module, name: str) -> bool:
    return type(m).__name__ == name


def _listed(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Does a module stand in a list?"""
    home = path.rpartition(".")[0]
    return home != "" and isinstance(modules[home], LISTS) and any(True for _ in modules[path].parameters())


def _lists(who: str, by: str, blocks: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The lists that blocks stand in."""
    outer = {p for p in blocks if not any(p.startswith(f"{q}.") for q in blocks)}
    units = tuple(dict.fromkeys(p.rpartition(".")[0] for p in sorted(outer, key=list(modules).index)))
    for u in units:
        for name, block in modules[u].named_children():
            path, kind = f"{u}.{name}", type(block).__name__
            if type(block) in (nn.ModuleList, nn.ModuleDict):
                why = f"names {path!r}, a {kind} that holds blocks and runs none"
                raise ValueError(f"stateless: {by} of {who} {why}; name what is in it, or write units=(...)")
            if path not in outer and any(True for _ in block.parameters()):
                why = f"names some blocks of {u!r}, but not {path!r}, a {kind}"
                raise ValueError(f"stateless: {by} of {who} {why}; name all, or write units=(...)")
    return units


def _words(by: str, units: Sequence[str], idle: Sequence[str], modules: Mapping[str, nn.Module]) -> str:
    lists, homes = list[str](), dict[int, set[str]]()
    for u in units:
        kinds = Counter(type(b).__name__ for b in modules[u].children())
        lists.append(f"{u!r} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})")
        for name, block in modules[u].named_children():
            for p in block.parameters():
                homes.setdefault(id(p), set()).add(f"{u}.{name}")
    tied = sorted({path for paths in homes.values() if len(paths) > 1 for path in paths})
    also = f"; what {tied} share is gathered with the rest" if tied else ""
    none = f"; {list(idle)} name nothing" if idle else ""
    return f"stateless: units are {', '.join(lists)}, as {by} names them{none}{also}"

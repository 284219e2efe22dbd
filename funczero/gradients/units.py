"""Which blocks of a module are units: what is gathered, run and dropped together; and which a rank may leave out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from funczero.core.types import ChainError

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
EXPERTS = re.compile(r"(^|[_./])experts?([./]|$)")  # paths of lists of experts, and of lists inside one


def find_units(module: nn.Module, units: Sequence[str] | None) -> tuple[str, ...]:
    """Paths of the lists named, or of those found: of nested ones those that hold least at a time.

    A list inside a layer is gathered with it, for the layer may run its blocks or not, as a router does. A list inside
    a stage is not: stages are blocks that hold lists, and of which no more than half are alike in shape, or that hold
    lists of one type and nothing else; and none of these lists is called experts. Lists of one type are looked for
    first. Lists of several (attention and state space blocks in turn) count where they hold less.

    Raises:
      ValueError: a name is not that of a list of blocks.
    """
    modules = dict(module.named_modules())
    lists = {p: list(m.children()) for p, m in modules.items() if p and isinstance(m, LISTS)}
    repeated = [p for p, blocks in lists.items() if _repeated(blocks) or _record(p, blocks, lists)]
    if units is not None:
        units = (units,) if isinstance(units, str) else tuple(units)
        for u in units:
            blocks = list(modules[u].children()) if u in modules else []
            missing = not any(list(b.parameters()) for b in blocks) or not all(map(_runs, blocks))
            if missing or list(modules[u].parameters(recurse=False)):
                found = [p for p in repeated if len({type(b) for b in lists[p]}) == 1]
                raise ValueError(
                    f"stateless: units={u!r} names no list of blocks in {type(module).__name__}; its repeated lists are"
                    f" {found}"
                )
        return units
    layers = [p for p in repeated if not _stages(p, modules, repeated)]
    free = [p for p in repeated if not any(p.startswith(f"{q}.") for q in layers)]
    found = [p for p in free if len({type(b) for b in lists[p]}) == 1]
    choices = [c for c in (_outer(found), _inner(found), _outer(free), _inner(free)) if c]

    def held(paths: tuple[str, ...]) -> int:  # the rest and two units, less a constant
        sizes = [sum(p.numel() for p in b.parameters()) for path in paths for b in lists[path]]
        return 2 * max(sizes) - sum(sizes)

    return min(choices, key=held) if choices else ()


def _stages(path: str, modules: dict[str, nn.Module], repeated: Sequence[str]) -> bool:
    """Are a list's blocks stages, which run all the lists in them?"""
    shapes: list[Counter[torch.Size]] = []
    rest, one_type = list[nn.Parameter](), True
    for name, block in modules[path].named_children():
        inner = [q for q in repeated if q == f"{path}.{name}" or q.startswith(f"{path}.{name}.")]
        if not inner or any(EXPERTS.search(q[len(path) :]) for q in inner):
            return False
        inside = {id(p) for q in inner for p in modules[q].parameters()}
        shapes.append(Counter(p.shape for p in block.parameters()))
        rest += [p for p in block.parameters() if id(p) not in inside]
        one_type = one_type and all(len({type(b) for b in modules[q].children()}) == 1 for q in inner)
    alike = lambda a, b: 4 * (a & b).total() >= 3 * max(a.total(), b.total())  # one may have a layer more
    most = max((sum(alike(a, b) for b in shapes) for a in shapes), default=0)
    return 2 * most <= len(shapes) or not rest and one_type


def sometimes(module: nn.Module, units: Sequence[str]) -> tuple[str, ...]:
    """Of the units, the lists whose blocks not every rank may run: experts, and layers that are dropped in training."""
    return tuple(u for u in units if EXPERTS.search(u) or _drops(module.get_submodule(u.rpartition(".")[0])))


def _drops(owner: nn.Module) -> bool:
    """Does the module that holds a list leave layers out?"""
    settings = {**getattr(getattr(owner, "config", None), "__dict__", {}), **vars(owner)}
    dropped = (v for k, v in settings.items() if "layerdrop" in k.replace("_", "").lower())
    return owner.training and any(isinstance(v, (int, float)) and v > 0 for v in dropped)


def conditional_of(who: str, units: Sequence[str], conditional: Sequence[str] | None) -> tuple[str, ...]:
    """Of the units, the conditional ones: those named, or by default what is called experts.

    Raises:
      ChainError: a name is not that of a unit.
    """
    if conditional is None:
        return tuple(u for u in units if EXPERTS.search(u))
    named = (conditional,) if isinstance(conditional, str) else tuple(conditional)
    odd = next((c for c in named if c not in units), None)
    if odd is not None:
        raise ChainError(
            f"{who}: conditional names {odd!r}, which is not among the units {list(units)}; name it in units, too"
        )
    return named


def _outer(paths: Sequence[str]) -> tuple[str, ...]:
    return _apart(paths, lambda p, q: p.startswith(f"{q}."))


def _inner(paths: Sequence[str]) -> tuple[str, ...]:
    return _apart(paths, lambda p, q: q.startswith(f"{p}."))


def _apart(paths: Sequence[str], covered: Callable[[str, str], bool]) -> tuple[str, ...]:
    return tuple(p for p in paths if not any(covered(p, q) for q in paths))


def _repeated(blocks: list[nn.Module]) -> bool:
    """Are these blocks? Bare layers of torch.nn are not: a list of them is as often read as called."""
    return len(blocks) > 1 and all(list(b.parameters()) and not _bare(b) and _runs(b) for b in blocks)


def _record(path: str, blocks: list[nn.Module], lists: dict[str, list[nn.Module]]) -> bool:
    """Is this one of a list's lists of what runs together, as a U-Net's [block, block, attention, convolution]?"""
    others = lists.get(path.rpartition(".")[0], ())
    learning = [b for b in blocks if list(b.parameters())]
    return (
        len(others) > 1
        and not any(map(_runs, others))
        and all(map(_runs, learning))
        and any(not _bare(b) for b in learning)
    )


def _bare(block: nn.Module) -> bool:
    return not list(block.children()) and type(block).__module__.startswith("torch.nn.")


def _runs(block: nn.Module) -> bool:
    """Has it a forward? A list has none: what is in it is called."""
    return not isinstance(block, (nn.ModuleList, nn.ModuleDict)) or type(block).forward is not nn.Module.forward


def neighbours(paths: Sequence[str], i: int) -> tuple[int | None, int | None]:
    """Which blocks run before and after block i, as far as its own list says: of two lists nobody knows which runs
    first.

    >>> neighbours(["a.0", "a.1", "b.0"], 1)
    (0, None)
    """
    home = paths[i].rpartition(".")[0]
    near = lambda j: j if 0 <= j < len(paths) and paths[j].rpartition(".")[0] == home else None
    return near(i - 1), near(i + 1)

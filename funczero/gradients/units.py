"""Which blocks of a module are units: what is gathered, run and dropped together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_units(module: nn.Module, units: Sequence[str] | None) -> tuple[str, ...]:
    """Paths of the lists named, or of those found: of nested ones (stages of blocks, blocks of experts) those that hold
    least at a time.

    Lists of one type are looked for first. Lists of several (attention and state space blocks in turn) count where they
    hold less.

    Raises:
      ValueError: a name is not that of a list of blocks.
    """
    modules = dict(module.named_modules())
    lists = {p: list(m.children()) for p, m in modules.items() if p and isinstance(m, LISTS)}
    found = [p for p, blocks in lists.items() if _repeated(blocks) and len({type(b) for b in blocks}) == 1]
    if units is not None:
        units = (units,) if isinstance(units, str) else tuple(units)
        for u in units:
            blocks = list(modules[u].children()) if u in modules else []
            if not any(list(b.parameters()) for b in blocks) or list(modules[u].parameters(recurse=False)):
                raise ValueError(
                    f"stateless: units={u!r} names no list of blocks in {type(module).__name__}; its repeated lists are"
                    f" {found}"
                )
        return units
    mixed = [p for p, blocks in lists.items() if _repeated(blocks)]
    choices = [c for c in (_outer(found), _inner(found), _outer(mixed)) if c]

    def held(paths: tuple[str, ...]) -> int:  # the rest and two units, less a constant
        sizes = [sum(p.numel() for p in b.parameters()) for path in paths for b in lists[path]]
        return 2 * max(sizes) - sum(sizes)

    return min(choices, key=held) if choices else ()


def _outer(paths: Sequence[str]) -> tuple[str, ...]:
    return _apart(paths, lambda p, q: p.startswith(f"{q}."))


def _inner(paths: Sequence[str]) -> tuple[str, ...]:
    return _apart(paths, lambda p, q: q.startswith(f"{p}."))


def _apart(paths: Sequence[str], covered: Callable[[str, str], bool]) -> tuple[str, ...]:
    return tuple(p for p in paths if not any(covered(p, q) for q in paths))


def _repeated(blocks: list[nn.Module]) -> bool:
    """Are these blocks? Bare layers of torch.nn are not: a list of them is as often read as called."""
    return len(blocks) > 1 and all(
        list(b.parameters()) and (list(b.children()) or not type(b).__module__.startswith("torch.nn.")) for b in blocks
    )


def neighbours(paths: Sequence[str], i: int) -> tuple[int | None, int | None]:
    """Which blocks run before and after block i, as far as its own list says: of two lists nobody knows which runs
    first.

    >>> neighbours(["a.0", "a.1", "b.0"], 1)
    (0, None)
    """
    home = paths[i].rpartition(".")[0]
    near = lambda j: j if 0 <= j < len(paths) and paths[j].rpartition(".")[0] == home else None
    return near(i - 1), near(i + 1)

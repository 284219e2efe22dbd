"""Pytrees: leaves, paths and maps, over torch's own registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funczero.core.types import Tree

Value = TypeVar("Value")

leaves = pytree.tree_leaves
flatten = pytree.tree_flatten
map = pytree.tree_map  # noqa: A001


def unflatten(leaves: Iterable[Any], treedef: pytree.TreeSpec) -> Tree:
    """The tree again; a plain dict, list or tuple of leaves, which a block's parameters are, at once.

    >>> found, form = flatten({"w": 1, "b": 2})
    >>> unflatten([x + 1 for x in found], form)
    {'w': 2, 'b': 3}
    """
    values, kind = list(leaves), treedef.type
    if kind in (dict, list, tuple) and treedef.num_nodes == len(values) + 1 == treedef.num_leaves + 1:
        if kind is dict:
            return dict(zip(treedef.context, values, strict=True))
        return tuple(values) if kind is tuple else values
    return pytree.tree_unflatten(values, treedef)


def path_name(path: pytree.KeyPath) -> str:
    """One string for a key path: dict keys, list indices and field names, joined by '/'."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def paths(tree: Tree) -> list[tuple[str, Any]]:
    """Every leaf with its path.

    >>> paths({"a": [1, 2], "b": {"c": 3}})
    [('a/0', 1), ('a/1', 2), ('b/c', 3)]
    """
    return [(path_name(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def where(ok: Tensor, new: Tree, old: Tree) -> Tree:
    """Leaf by leaf `new` where `ok`, else `old`; leaves that are no tensors must agree."""
    return map(lambda n, o: torch.where(ok, n, o) if isinstance(n, Tensor) else n, new, old)


def clone(tree: Tree) -> Tree:
    """A copy of every tensor of a tree."""
    return map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def tensors(tree: Tree) -> list[Tensor]:
    """The tensors among the leaves."""
    if isinstance(tree, Tensor):
        return [tree]
    return [x for x in leaves(tree) if isinstance(x, Tensor)]


def floats(tree: Tree) -> tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], Tree]]:
    """The floating tensors of a tree by path, and the tree again out of others in their places.

    For torch.func, which differentiates by floats alone: a whole state has integers in it, too.

    >>> found, join = floats({"n": torch.tensor(2), "x": torch.tensor(3.0)})
    >>> torch.func.grad(lambda f: (lambda t: t["x"] ** t["n"])(join(f)))(found)
    {'x': tensor(6.)}
    """
    named, form = paths(tree), flatten(tree)[1]
    found = {path: x for path, x in named if isinstance(x, Tensor) and x.is_floating_point()}

    def join(values: Mapping[str, Tensor]) -> Tree:
        if values.keys() != found.keys():
            odd = sorted(values.keys() ^ found.keys())[0]
            raise KeyError(f"floats: {odd!r} is missing or too many; give one value for each of the given paths")
        return unflatten([values[path] if path in found else x for path, x in named], form)

    return found, join


class Path(str):
    """A leaf's first name, which knows the others that it has where it is tied."""

    names: tuple[str, ...]

    def __new__(cls, *names: str) -> Path:
        """The first name first."""
        self = super().__new__(cls, names[0])
        self.names = names
        return self

    def __getnewargs__(self) -> tuple[str, ...]:  # type: ignore[override]
        """For copies and pickles."""
        return self.names


def names(path: str) -> tuple[str, ...]:
    """All names of a leaf.

    >>> names(Path("embed", "head")), names("norm")
    (('embed', 'head'), ('norm',))
    """
    return path.names if isinstance(path, Path) else (path,)


def rule(rules: Iterable[tuple[str, Value]], path: str, default: Value) -> Value:
    """The value of the first `(regex, value)` whose regex is found in the path, by any of its names."""
    return next((value for regex, value in rules if any(re.search(regex, n) for n in names(path))), default)


def matcher(which: str | Callable[[str], bool] | None) -> Callable[[str], bool]:
    """A predicate on paths, by any of their names, from a regex, a predicate or None (never)."""
    if which is None:
        return lambda path: False
    one = which if callable(which) else lambda name: re.search(which, name) is not None
    return lambda path: any(one(n) for n in names(path))


def unmatched(regex: str, paths: Sequence[str]) -> str:
    """Why a regex that finds nothing among the paths is a mistake; nothing where it finds one, or says that it means
    none ('^$').
    """
    if re.search(regex, "") or any(re.search(regex, n) for path in paths for n in names(path)):
        return ""
    return (
        f"the regex {regex!r} matches no parameter; their paths begin with"
        f" {sorted({p.split('/')[0] for p in paths})[:8]}"
    )

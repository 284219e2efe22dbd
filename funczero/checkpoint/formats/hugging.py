"""From the keys of a Hugging Face model's files to the names of the model's own leaves.

A model's files may name leaves otherwise than its module does, or hold them in pieces (an expert each, where the module
has all of them in one). transformers knows the renamings and conversions of its models; here they are planned over
shapes, and run for a leaf when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.leaf import Leaf


class Group(NamedTuple):
    """Leaves of files that a conversion makes leaves of a model of."""

    converter: Any
    sources: list[tuple[str, str]]  # (key, the pattern that it was found by)


def is_model(module: Any) -> bool:
    """Is this one of transformers' models, as far as it was imported?"""
    return isinstance(module, nn.Module) and hasattr(module, "base_model_prefix") and hasattr(module, "config")


def by_name(model: nn.Module, found: dict[str, Leaf], names: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaves of files by the names that they have in a model; a key that it does not know keeps its own.

    Args:
      names: of the model's parameters and buffers.

    Raises:
      CheckpointError: a conversion does not fit the files.
    """
    if not is_model(model):
        return found
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    steps: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [x for x in steps if isinstance(x, WeightRenaming)]
    converters = [x for x in steps if not isinstance(x, WeightRenaming)]
    by_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
    prefix: Any = model.base_model_prefix
    out: dict[str, Leaf] = {}
    groups: dict[str, Group] = {}
    for key in sorted(found, key=dot_natural_key):
        known: Any = names
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in names and key in names:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if pattern is None or name not in names:
            if name in out:
                raise CheckpointError(f"from_pretrained: two leaves of the files are {name!r} of the model")
            out[name if name in names else key] = found[key]
        else:
            groups.setdefault(name, Group(by_pattern[pattern], [])).sources.append((key, pattern))
    for name, group in groups.items():
        out |= _converted(model, name, group, found)
    return out


def _converted(model: nn.Module, name: str, group: Group, found: dict[str, Leaf]) -> dict[str, Leaf]:
    """The leaves that a conversion gives: their shapes are known by running it without values."""

    def empty(key: str) -> Callable[[], Tensor]:
        return partial(torch.empty, found[key].shape, dtype=found[key].dtype, device="meta")

    def run(source: Callable[[str], Callable[[], Tensor]]) -> dict[str, Tensor]:
        converter = deepcopy(group.converter)
        for key, pattern in group.sources:
            converter.add_tensor(name, key, pattern, source(key))
        made = converter.convert(name, model=model, config=model.config)
        return {n: x[0] if isinstance(x, list) else x for n, x in made.items()}

    def rows(target: str, a: int, b: int) -> Tensor:
        return run(lambda key: found[key].read)[target][a:b].contiguous()

    try:
        shapes = run(empty)
    except Exception as e:  # whatever a conversion makes of leaves that it does not expect
        raise CheckpointError(
            f"from_pretrained: {name!r} cannot be made of {group.sources[0][0]!r} and {len(group.sources) - 1} more"
            f" leaves ({type(e).__name__}: {str(e)[:200]})"
        ) from None
    file = found[group.sources[0][0]].file
    return {n: Leaf(x.dtype, tuple(x.shape), partial(rows, n), file) for n, x in shapes.items()}

"""Which buffers of a module a forward changes, and by which rule the values of micro-batches become one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from funczero.core import tree
from funczero.transforms.model_state import Rule


def changing(module: nn.Module) -> Iterator[tuple[str, Rule]]:
    """(name, rule) of the buffers that layers of torch change when they train.

    Statistics are averaged. What counts calls or iterates on weights is the same for every micro-batch.
    """
    for path, m in module.named_modules():
        prefix = f"{path}." if path else ""
        if not m.training:
            continue
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats:
            yield from ((f"{prefix}{name}", "mean") for name in ("running_mean", "running_var"))
            yield f"{prefix}num_batches_tracked", "first"
        if isinstance(m, _SpectralNorm):
            yield from ((f"{prefix}{name}", "first") for name in ("_u", "_v"))
        for hook in m._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                yield from ((f"{prefix}{hook.name}{end}", "first") for end in ("_u", "_v"))


def computed(module: nn.Module) -> frozenset[str]:
    """Names of tensors that a hook of torch computes before every forward: nothing is lost with them."""
    found = set()
    for path, m in module.named_modules():
        for hook in m._forward_pre_hooks.values():
            if isinstance(hook, (SpectralNorm, WeightNorm)):
                found.add(f"{path}.{hook.name}".lstrip("."))
    return frozenset(found)


def state_rules(
    module: nn.Module, names: Sequence[str], given: str | Sequence[tuple[str, Rule]]
) -> tuple[tuple[str, Rule | None], ...]:
    """(name, rule) of every buffer that a forward may change; None for the default of its dtype.

    Args:
      names: of its buffers.
      given: a regex of names, or (regex, rule) pairs, which count before what is known of torch's layers.

    Raises:
      ValueError: a regex finds no buffer.
    """
    known = dict(changing(module))
    pairs: list[tuple[str, Rule | None]] = [(given, None)] if isinstance(given, str) else [*given]
    for regex, _ in pairs:
        if regex and not any(re.search(regex, name) for name in names):
            raise ValueError(f"stateless: state={regex!r} finds no buffer of the module; it has {[*names][:8]}")
    pairs = [(regex, rule) for regex, rule in pairs if regex]
    found = ((name, tree.rule(pairs, name, known.get(name)) or known.get(name)) for name in names)
    return tuple((n, rule) for n, rule in found if n in known or any(re.search(regex, n) for regex, _ in pairs))

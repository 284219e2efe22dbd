"""Low-rank adapters beside frozen weights, of a module or of a tree of parameters."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funczero.core import rng, tree
from funczero.core.number import number

KINDS = "nn.Linear and transformers' Conv1D"


class Adapted(NamedTuple):
    """A frozen matrix and what is learned beside it; any leading dims are those of a stack."""

    base: Tensor  # [..., n, m]
    lora_A: Tensor  # [..., rank, m]
    lora_B: Tensor  # [..., n, rank], zero at first


class Lora(NamedTuple):
    """Which matrices get adapters, and how large; see `fz.lora`."""

    rank: int
    match: str
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def module(self, module: nn.Module, key: int = 0) -> nn.Module:
        """A module of the same tree with adapters in it, for fz.stateless; the given one stays as it is.

        Weights are shared and frozen, adapters are drawn from the key and their path, and have PEFT's names: q_proj has
        q_proj.base_layer, q_proj.lora_A and q_proj.lora_B. The model is called as before.

        Raises:
          ValueError: no layer's path matches.
          TypeError: a matching layer with weights is of a kind that has no adapter here; by path.
        """
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
        memo |= {id(b): b for b in module.buffers()}
        out = copy.deepcopy(module, memo)
        found = [name for name, m in out.named_modules() if _adaptable(m) and re.search(self.match, name)]
        odd = [
            name
            for name, m in out.named_modules()
            if re.search(self.match, name) and not _adaptable(m) and next(m.parameters(recurse=False), None) is not None
        ]
        if odd:
            what = type(out.get_submodule(odd[0])).__name__
            raise TypeError(f"lora: {odd[0]!r} is a {what}, but adapters are for {KINDS}; write a match without it")
        if not found:
            some = [name for name, m in out.named_modules() if _adaptable(m)][:6]
            raise ValueError(f"lora: {self.match!r} is found in no path of a layer; such paths are {some}")
        for name in found:
            above, _, last = name.rpartition(".")
            layer = AdaptedLayer(out.get_submodule(name), self, rng.fold(key, name))
            if not above and not last:
                return layer
            setattr(out.get_submodule(above), last, layer)
        return out

    def init(self, params: Any, key: int = 0) -> Any:
        """A tree of parameters with an `Adapted` in the place of every matrix that matches.

        Raises:
          ValueError: no matrix' path matches.
          TypeError: a matching leaf is no matrix; by path.
        """
        named, found = tree.paths(params), 0
        out: list[Any] = []
        for path, x in named:
            if not re.search(self.match, path):
                out.append(x)
                continue
            if len(x.shape) < 2:
                raise TypeError(f"lora: {path!r} has shape {tuple(x.shape)} and is no matrix; write a match without it")
            *stack, n, m = x.shape
            a = rng.normal(rng.fold(key, path), (*stack, self.rank, m), std=1 / math.sqrt(m), dtype=torch.float64)
            out.append(Adapted(x, a.to(x.dtype), torch.zeros(*stack, n, self.rank, dtype=x.dtype)))
            found += 1
        if not found:
            raise ValueError(f"lora: {self.match!r} is found in no path; they are {[p for p, _ in named][:6]}")
        return tree.unflatten(out, tree.flatten(params)[1])

    def trainable(self, path: str) -> bool:
        """Is this the path of an adapter? For value_and_grad(trainable=lora.trainable)."""
        return re.search(r"(?:^|[/.])lora_[AB](?:\.weight)?$", path) is not None

    def merged(self, params: Any, module: nn.Module | None = None) -> Any:
        """Plain parameters: W + (alpha / rank) B A in the place of every adapted matrix.

        Of a tree it is pure and differentiable, for a loss, `lambda p, b: loss_fn(lora.merged(p), b)`, or for a block
        at the seam. Of a module's flat dict the result loads into the module that had no adapters.

        Args:
          module: what `lora.module` returned, where params are the flat dict of it.

        Raises:
          ValueError: an adapted weight is tied to another parameter, which has no adapter.
        """
        if module is None:
            is_leaf = lambda x: isinstance(x, Adapted)
            return tree.map(lambda x: self._sum(*x) if is_leaf(x) else x, params, is_leaf=is_leaf)
        out, at = dict(params), [id(x) for x in params.values()]
        for name, layer in adapted(module):
            base, a, b = (out.pop(f"{name}.{own}.weight") for own in ("base_layer", "lora_A", "lora_B"))
            if at.count(id(base)) > 1:
                other = next(n for n, x in params.items() if x is base and not n.startswith(f"{name}."))
                why = f"shares its weight with {other!r}, and merged it would be another"
                raise ValueError(f"lora: {name!r} {why}; leave it out of match, or untie them first")
            out[f"{name}.weight"] = self._sum(base.T, a, b).T if layer.turned else self._sum(base, a, b)
            if f"{name}.base_layer.bias" in out:
                out[f"{name}.bias"] = out.pop(f"{name}.base_layer.bias")
        return out

    def _sum(self, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return base + self.scale * (b @ a)


def lora(rank: int, match: str, alpha: float | None = None, dropout: float = 0.0) -> Lora:
    """Adapters beside frozen weights: W + (alpha / rank) B A, of which only A and B learn, are reduced and have
    moments.

    Of a module: `model = lora.module(model)`, and fz.stateless(model, loss) as ever, with
    `trainable=loss_fn.trainable`. Of a tree: `params = lora.init(params)`, `lora.merged(params)` in the loss, and
    `trainable=lora.trainable`. At stage 3 the frozen weights are sharded, too. fz.save_adapters writes PEFT's layout.

    >>> import funczero as fz
    >>> adapters = fz.lora(rank=1, match="w", alpha=2)
    >>> params = adapters.init({"w": torch.ones(2, 3), "b": torch.zeros(2)})
    >>> [path for path, _ in fz.tree.paths(params)], adapters.merged(params)["w"].shape
    (['w/base', 'w/lora_A', 'w/lora_B', 'b'], torch.Size([2, 3]))

    Args:
      rank: of the product, at least 1.
      match: a regex searched in the path of a layer, or of a leaf of a tree.
      alpha: by default the rank, so that nothing is scaled.
      dropout: on the input of A while training, modules only; value_and_grad(rng=True) gives its key.

    Source: Hu et al., LoRA, arXiv 2106.09685; names and layout are PEFT's.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"lora: rank={rank!r} is no rank; write an int of at least 1")
    if not isinstance(match, str):
        raise TypeError(f"lora: match={match!r} is no regex; write one that is found in the paths, as 'q_proj|v_proj'")
    try:
        re.compile(match)
    except re.error as e:
        raise ValueError(f"lora: match={match!r} is no regex ({e}); write one that is found in the paths") from None
    alpha = float(rank) if alpha is None else number("lora", "alpha", alpha, above=True)
    return Lora(rank, match, alpha, number("lora", "dropout", dropout, high=1.0))


class AdaptedLayer(nn.Module):
    """A linear layer with an adapter: base(x) + scale * B(A(dropout(x)))."""

    def __init__(self, base: nn.Module, own: Lora, key: int) -> None:
        """base: the layer, whose weights are frozen."""
        super().__init__()
        weight: Any = base.weight
        self.turned = not isinstance(base, nn.Linear)  # Conv1D keeps [in, out]
        n, m = weight.shape[::-1] if self.turned else weight.shape
        # beside a base that is read later, adapters have values already
        like = {"dtype": weight.dtype, "device": "cpu" if weight.is_meta else weight.device}
        self.base_layer, self.scale = base, own.scale
        self.lora_A, self.lora_B = nn.Linear(m, own.rank, False, **like), nn.Linear(own.rank, n, False, **like)
        self.dropout = nn.Dropout(own.dropout) if own.dropout else nn.Identity()
        with torch.no_grad():
            bound = 1 / math.sqrt(m)  # of kaiming_uniform_(a=sqrt(5)), as PEFT begins
            drawn = torch.rand(own.rank, m, generator=rng.generator(key), dtype=torch.float64) * 2 * bound - bound
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, and the adapter's part."""
        out: Tensor = self.base_layer(x)
        return out + self.lora_B(self.lora_A(self.dropout(x))) * self.scale


def adapted(module: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """The layers with adapters, by path."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, AdaptedLayer)]


def adapters_of(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """The adapters among a module's parameters."""
    return {n: x for n, x in params.items() if re.search(r"(?:^|\.)lora_[AB]\.weight$", n)}


def _adaptable(m: nn.Module) -> bool:
    return isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" and hasattr(m, "nf")

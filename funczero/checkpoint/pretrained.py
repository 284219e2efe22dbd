"""Parameters of a model from the files that Hugging Face's save_pretrained, funczero export or torch wrote, each part
read from its place when a rank needs it: no rank ever holds the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from absl import logging
from torch import Tensor, nn

from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.hugging import by_name, is_model
from funczero.checkpoint.formats.leaf import Leaf
from funczero.checkpoint.formats.naming import Taken
from funczero.checkpoint.formats.sources import read
from funczero.checkpoint.names import listed, state_dict_key
from funczero.gradients.lora import Lora
from funczero.layout.init import init
from funczero.layout.lazy import Fill

ROWS = "mean", "zeros", "drawn"
CHUNK = 16 << 20  # values of which a mean is taken, or two leaves are compared, at a time


class Pretrained(NamedTuple):
    """A module whose parameters are on the meta device, and those to read by name; see `fz.from_pretrained`."""

    module: nn.Module
    params: dict[str, Any]


def from_pretrained(
    what: Any,
    folder: str | Path,
    *,
    adapters: Lora | None = None,
    vocabulary: int | None = None,
    new_rows: str = "mean",
    key: int | None = None,
    strict: bool = True,
) -> Pretrained:
    """(module, params): a model without values, and its parameters for step.init, read part by part from a folder.

    Law: the values are those of the model's own from_pretrained, on any mesh and at any stage. In memory a rank holds
    its part and at most one whole leaf beside it; a leaf that transformers puts together of several, as fused experts,
    a few times over while it is read. Nothing that is read is run.

    >>> import tempfile, torch, funczero as fz
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"weight": torch.ones(1, 2)}, f"{folder}/model.safetensors")
    ...     module, params = fz.from_pretrained(lambda: torch.nn.Linear(2, 1, bias=False), folder)
    ...     loss_fn, _ = fz.stateless(module, lambda m, x: (m(x).sum(), torch.tensor(float(len(x)))))
    ...     step = fz.train_step(fz.value_and_grad(loss_fn), fz.sgd(0.5))
    ...     state, metrics = step(step.init(params), torch.ones(3, 2))
    >>> module.weight.is_meta, metrics.loss.item(), step.params(state)["weight"].tolist()
    (True, 2.0, [[0.5, 0.5]])

    Args:
      what: one of transformers' classes (an Auto class, too) whose config lies in the folder, a config of theirs, a
        function that makes a module, or a module, on meta if it is large.
      folder: as save_pretrained, `funczero export` or torch.save wrote it; or a file of it, or an index.
      adapters: fz.lora: the module with adapters, drawn from `key` or 0, and everything else frozen.
      vocabulary: rows of the input and output embeddings; of fewer than the files have the first ones are read.
      new_rows: rows that the files do not have: the "mean" of theirs, "zeros", or "drawn" from the key as the model
        draws its own.
      key: draw what the files lack, as fz.init does; by default that is an error.
      strict: what the files hold and the model does not know is an error; otherwise it is left out, in print.

    Returns: the module, in evaluation mode as Hugging Face's; and {name: part to read}, tied names alike.

    Raises:
      CheckpointError: a file is malformed, a leaf is missing, unknown or of another shape; by name.
      TypeError: `what` is none of these.
    """
    folder = Path(folder)
    base = _made(what, folder)
    _check_rows(new_rows, vocabulary, key)
    if vocabulary is not None:
        _resize(base, vocabulary)
    names: dict[str, Any] = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
    found = by_name(base, {state_dict_key(n): x for n, x in read(folder, Taken(False)).leaves.items()}, names)
    module = base if adapters is None else adapters.module(base, key or 0)
    drawn = partial(_drawn, base, key)
    growing = dict.fromkeys(_embeddings(base) if vocabulary is not None else (), new_rows)
    params = _params(module, found, growing, drawn, str(folder))
    _buffers(module, found, str(folder))
    _left(base, set(found) - set(names), strict, str(folder))
    return Pretrained(module.eval(), params)


def _made(what: Any, folder: Path) -> nn.Module:
    """The module, with parameters on meta where it is made here; buffers have values."""
    if isinstance(what, nn.Module):
        return what
    home = folder if folder.is_dir() else folder.parent
    with _on_meta():
        if hasattr(what, "from_config") and not isinstance(what, nn.Module) and not hasattr(what, "config_class"):
            import transformers

            config = transformers.AutoConfig.from_pretrained(home, trust_remote_code=False)
            return _plain(what.from_config(_plain(config)))
        if isinstance(what, type) and (kind_of := getattr(what, "config_class", None)) is not None:
            return _plain(what(_plain(kind_of.from_pretrained(home))))
        if hasattr(what, "architectures"):
            import transformers

            kind = getattr(transformers, (what.architectures or [""])[0], None)
            if kind is None:
                raise TypeError(
                    f"from_pretrained: the config names {what.architectures}, of which transformers has no class; give"
                    " the class itself"
                )
            return _plain(kind(_plain(what)))
        made = what() if callable(what) else None
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"from_pretrained: {type(what).__name__} is no class or config of transformers, no module, and no function"
            " that makes one; give one of these"
        )
    return made


def _plain(x: Any) -> Any:
    """A config, or a model, that is not quantised by somebody else."""
    config = getattr(x, "config", x)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            "from_pretrained: the model's files are quantised (quantization_config), which is not read; give the files"
            " of its floating weights"
        )
    return x


@contextmanager
def _on_meta() -> Iterator[None]:
    """Modules made in here have parameters without values, and buffers with them."""
    register = nn.Module.register_parameter

    def without(self: nn.Module, name: str, p: nn.Parameter | None) -> None:
        if p is not None and not p.is_meta:
            p = nn.Parameter(p.detach().to("meta"), p.requires_grad)
        register(self, name, p)

    nn.Module.register_parameter = without  # type: ignore[method-assign,assignment]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check_rows(new_rows: str, vocabulary: int | None, key: int | None) -> None:
    if new_rows not in ROWS:
        raise ValueError(f"from_pretrained: new_rows={new_rows!r} does not exist; write one of {', '.join(ROWS)}")
    if new_rows != "mean" and vocabulary is None or new_rows == "drawn" and key is None:
        needs = "vocabulary=" if vocabulary is None else "key="
        raise ValueError(f"from_pretrained: new_rows={new_rows!r} is written without {needs}; write that, too")


def _resize(model: nn.Module, rows: int) -> None:
    if not is_model(model) or type(rows) is not int or rows < 1:
        raise ValueError(f"from_pretrained: vocabulary={rows!r} is a number of rows for one of transformers' models")
    with _on_meta():
        resize: Any = model.resize_token_embeddings
        resize(rows, mean_resizing=False)


def _embeddings(model: nn.Module) -> set[str]:
    """The names of the leaves that a vocabulary has rows in."""
    ours: Any = model
    layers = [x for x in (ours.get_input_embeddings(), ours.get_output_embeddings()) if x is not None]
    own = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    return {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in own}


def _params(
    module: nn.Module, found: dict[str, Leaf], growing: dict[str, str], drawn: Callable[[str], Any], folder: str
) -> dict[str, Any]:
    """Every parameter by name, tied ones as one object.

    Raises:
      CheckpointError: shapes differ, tied leaves do, or one is missing.
    """
    names: dict[int, list[str]] = {}
    own = dict(module.named_parameters(remove_duplicate=False))
    for name, p in own.items():
        names.setdefault(id(p), []).append(name)
    made: dict[int, Any] = {}
    missing = []
    for at, same in names.items():
        p = own[same[0]]
        there = [n for n in (_base_name(n) for n in same) if n in found]
        if len(there) > 1:
            _alike(found, there, folder)
        if there:
            new = growing.get(there[0], "")
            made[at] = _fill(there[0], p, found[there[0]], new, drawn if new == "drawn" else None, folder)
        elif not p.is_meta:
            made[at] = p.detach()  # of an adapter, or of a module that came with values
        elif (fill := drawn(_base_name(same[0]))) is not None:
            made[at] = fill
        else:
            missing.append(same[0])
    if missing:
        raise CheckpointError(
            f"from_pretrained: {folder!r} has no {listed(missing)}; write key=0 to draw what it lacks"
        )
    return {name: made[id(p)] for name, p in own.items()}


def _base_name(name: str) -> str:
    """The name of a parameter before adapters came in."""
    return name.replace(".base_layer.", ".")


def _fill(name: str, p: Tensor, leaf: Leaf, new: str, drawn: Callable[[str], Any] | None, folder: str) -> Fill:
    shape = tuple(p.shape)
    if not leaf.dtype.is_floating_point:
        raise CheckpointError(f"from_pretrained: {name!r} in {folder!r} is {leaf.dtype}, and no floating parameter")
    if leaf.shape == shape:
        return Fill(shape, leaf.dtype, leaf.read, leaf.rows if shape else None)
    if not new or leaf.shape[1:] != shape[1:]:
        raise CheckpointError(
            f"from_pretrained: {name!r} has shape {list(leaf.shape)} in {folder!r} and {list(shape)} in the model; give"
            " the config of these files"
            + ", or vocabulary= for embeddings" * (leaf.shape[1:] == shape[1:])
        )
    rows = partial(_grown, leaf, new if drawn is None else drawn(name))
    return Fill(shape, leaf.dtype, partial(rows, 0, shape[0]), rows)


def _grown(leaf: Leaf, new: str | Fill, a: int, b: int) -> Tensor:
    """Rows of a leaf that has more of them than its file.

    Args:
      new: the others are the "mean" of all that are there, "zeros", or those of another leaf.
    """
    n = leaf.shape[0]
    old = leaf.rows(min(a, n), min(b, n))
    if b <= n:
        return old
    if isinstance(new, Fill):
        return torch.cat([old, new.part((slice(max(a, n), b),)).to(leaf.dtype)])
    if new == "zeros":
        return torch.cat([old, old.new_zeros(b - max(a, n), *leaf.shape[1:])])
    total = torch.zeros(leaf.shape[1:], dtype=torch.float64)
    step = max(1, CHUNK // max(1, total.numel()))
    for i in range(0, n, step):
        total += leaf.rows(i, min(n, i + step)).double().sum(0)
    mean = (total / max(1, n)).to(leaf.dtype)
    return torch.cat([old, mean.expand(b - max(a, n), *mean.shape)])


def _alike(found: dict[str, Leaf], names: list[str], folder: str) -> None:
    """Refuse names of one parameter that the files have different values for."""
    first, *others = (found[n] for n in names)
    for name, x in zip(names[1:], others, strict=True):
        step = max(1, CHUNK // max(1, x.nbytes // max(1, x.shape[0] if x.shape else 1)))
        cuts = range(0, x.shape[0], step) if x.shape else (0,)
        same = x.shape == first.shape and all(torch.equal(first.rows(i, j), x.rows(i, j)) for i in cuts
                                              for j in (min(i + step, x.shape[0] if x.shape else 1),))  # fmt: skip
        if not same:
            raise CheckpointError(
                f"from_pretrained: {names[0]!r} and {name!r} are one parameter of the model, but differ in {folder!r};"
                " give a config that does not tie them"
            )


def _drawn(module: nn.Module, key: int | None, name: str) -> Fill | None:
    """A parameter that the files lack, to be drawn; None where that was not asked for."""
    if key is None:
        return None
    own: Any = module
    made: Mapping[str, Any] = init(module, key, own._init_weights if is_model(module) else None)
    return made[name]


def _buffers(module: nn.Module, found: dict[str, Leaf], folder: str) -> None:
    """Fill the module's buffers that the files have; the others are as the module was made."""
    for name, x in module.named_buffers():
        if name in found:
            if x.is_meta or tuple(x.shape) != found[name].shape:
                raise CheckpointError(
                    f"from_pretrained: buffer {name!r} has shape {list(found[name].shape)} in {folder!r} and"
                    f" {list(x.shape)} in the module{', where it has no memory' if x.is_meta else ''}"
                )
            x.copy_(found[name].read())


def _left(module: nn.Module, extra: set[str], strict: bool, folder: str) -> None:
    """What the model does not know, but for what its class says may be there."""
    known = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = sorted(n for n in extra if not any(re.search(pattern, n) for pattern in known))
    if left and strict:
        raise CheckpointError(
            f"from_pretrained: {folder!r} also holds {listed(left)}, which the model does not know; write strict=False"
            " to leave them out"
        )
    if left:
        logging.warning("from_pretrained: %s of %s left out, which the model does not know", listed(left), folder)

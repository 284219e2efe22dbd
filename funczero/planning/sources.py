"""What can be planned from a command line: a file that builds a step, a config of Hugging Face, a ds_config.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funczero.core import rows
from funczero.gradients.gradient import value_and_grad
from funczero.gradients.stateless import stateless
from funczero.layout.spec import P
from funczero.optim import adamw
from funczero.planning.update import shapes_of
from funczero.step.step import Step
from funczero.step.train_step import train_step
from funczero.step.zero import zero
from funczero.testing.parity import load
from funczero.transforms.chain import Source
from funczero.transforms.clip import clip_by_global_norm

META = torch.device("meta")
LENGTH = 1024  # tokens of a row


class Model(NamedTuple):
    """What a plan needs of a model that somebody named."""

    loss_fn: Callable[..., Any]
    params: dict[str, Tensor]  # on meta
    rows: Callable[[int], Any]  # a batch of so many


def hugging(where: str, length: int | None = None) -> Model:
    """A causal language model of transformers, by its config: parameters on meta, tokens of a length.

    Args:
      where: a config.json, a folder that holds one, or a transformers config.
      length: None: 1024, or all positions that the config has, if they are fewer.

    Raises:
      ValueError: transformers is not installed, or has no such model; the config has fewer positions.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
    except ImportError:
        raise ValueError("plan: a config of Hugging Face needs transformers; install it, or name a .py file") from None
    try:
        config = where if isinstance(where, PretrainedConfig) else AutoConfig.from_pretrained(str(where))
        with META:
            module = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"plan: {str(where)!r} is no model of transformers ({str(error).splitlines()[0]})") from None
    most = getattr(config, "max_position_embeddings", None) or length or LENGTH
    if (length or 0) > most:
        raise ValueError(f"plan: --length={length}, but the config has {most} positions; write no more than those")
    size = length or min(LENGTH, most)
    _with_buffers(module)
    module.config.use_cache = False

    def loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        out = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)
        n = float(batch["labels"].numel())
        return out.loss * n, out.loss.detach().new_tensor(n)

    loss_fn, params = stateless(module.train(), loss)
    tokens = lambda n: torch.empty(n, size, dtype=torch.int64, device=META)
    return Model(loss_fn, params, lambda n: {"input_ids": tokens(n), "labels": tokens(n)})


def _with_buffers(module: nn.Module) -> None:
    """Buffers with memory, whose values nobody computes with."""
    for each in module.modules():
        for name, x in each.named_buffers(recurse=False):
            if x.is_meta:
                each._buffers[name] = torch.zeros(x.shape, dtype=x.dtype)


def source_of(model: Model, axes: tuple[str, ...]) -> Source:
    """Its gradient, over a mesh whose axes all split the batch; keyed, since a model in training draws."""
    return value_and_grad(model.loss_fn, batch=P(axes), trainable=getattr(model.loss_fn, "trainable", None), rng=True)


def step_of(model: Model, mesh: Mapping[str, int], stage: int, accumulate: int, policy: str | None) -> Step:
    """AdamW with a clip at one of the stages."""
    axes = tuple(mesh)
    parts = (clip_by_global_norm(1.0), adamw(1e-4))
    over = axes if len(axes) > 1 else axes[0]
    chain = zero(source_of(model, axes), *parts, stage=stage, axis=over, accumulate=accumulate)
    return train_step(*chain, mesh=mesh, policy=policy)


def step_of_ds(page: str, model: Model, mesh: Mapping[str, int]) -> tuple[Step, int]:
    """What a ds_config.json makes of it, and the rows of its micro-batches.

    Raises:
      ValueError: what the config says is refused, in its own words; the mesh is not the one that it asks for.
    """
    from funczero.deepspeed.config.build import from_deepspeed
    from funczero.deepspeed.config.crossing import crossing
    from funczero.deepspeed.config.resolve import resolve

    if not Path(page).is_file():
        raise ValueError(f"plan: there is no file {page!r}; write the path of a ds_config.json")
    axes, sizes, found = tuple(mesh), tuple(mesh.values()), resolve(page, prod(mesh.values()))
    run = crossing(found, {"LOCAL_WORLD_SIZE": str(sizes[-1])} if len(sizes) > 1 else os.environ)
    if run.nested and tuple(run.mesh.values()) != sizes:
        wants = ",".join(f"{axis}={n}" for axis, n in run.mesh.items())
        raise ValueError(f"plan: {page} asks for groups of ranks, and --mesh has others; write --mesh={wants}")
    if run != crossing(found):
        why = f"in a run what {page} quantises would cross hosts of {sizes[-1]} ranks, and here it would not"
        raise ValueError(f"plan: {why}; set LOCAL_WORLD_SIZE={sizes[-1]} in the environment, as a launcher does")
    own: dict[str, Any] = {"trainable": getattr(model.loss_fn, "trainable", None), "rng": True}
    axis = axes if len(axes) > 1 else axes[0]
    chain, config = from_deepspeed(found, model.loss_fn, axis=axis, **own)
    return train_step(*chain, **{**config.arguments, "mesh": dict(mesh)}), found.triad.micro


class Built(NamedTuple):
    """A file's step builder."""

    make: Callable[[int, int], tuple[Step, Any]]  # (stage, accumulate) -> (step, params)
    batch: Any  # a global batch


def built(where: str) -> Built:
    """make_step(stage=, accumulate=) -> (step, params) and make_batch(t) of a file or a module, as parity's.

    Raises:
      ValueError: there is no such file or module, or it lacks one of the two.
    """
    try:
        make, batch = load(f"{where}:make_step"), load(f"{where}:make_batch")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):  # something that it imports itself
            raise
        raise ValueError(f"plan: there is no module {where!r}; write a .py file, or a module that imports") from None
    return Built(lambda stage, k: make(stage=stage, accumulate=k), shapes_of(batch(0), "leaf of the batch"))


def of_rows(batch: Any, n: int, cut: Any = 0) -> Any:
    """A batch like this one, of n rows, on meta.

    >>> of_rows({"x": torch.ones(4, 3), "scale": 2.0}, 1000)["x"].shape
    torch.Size([1000, 3])
    """
    leaves, build = rows.opened(batch, cut)

    def sized(leaf: rows.Leaf) -> Any:
        if leaf.rows < 0 or not isinstance(leaf.value, Tensor):
            return leaf.value
        shape = list(leaf.value.shape)
        shape[leaf.dim] = n
        return torch.empty(shape, dtype=leaf.value.dtype, device=META)

    return build([sized(leaf) for leaf in leaves])


def micros_of(step: Step, mesh: Mapping[str, int]) -> int:
    """Micro-batches of an update on a mesh."""
    over_time = prod(n for name, n in step.grad.layout.order if name == "accumulate")
    return over_time * prod(mesh[a] for a in step.source.batch)

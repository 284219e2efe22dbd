"""Adapters on disk as PEFT lays them out: adapter_model.safetensors beside adapter_config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from funczero.checkpoint.error import CheckpointError
from funczero.gradients.lora import Lora, adapted, adapters_of

PREFIX, FILE, CONFIG = "base_model.model.", "adapter_model.safetensors", "adapter_config.json"
OTHER = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}


def save_adapters(
    path: str | Path,
    lora: Lora,
    module: nn.Module,
    params: Mapping[str, Tensor],
    base: str | None = None,
    task: str | None = None,
) -> Path:
    """Write a module's adapters as PEFT reads them: PeftModel.from_pretrained(model, path) computes the same.

    To be called on one rank, with what step.params gave on all. Frozen weights are not written, nor is anything else
    that learned.

    Args:
      path: a folder, made if it is not there.
      module: what lora.module returned.
      params: the flat dict of its parameters, as step.params(state) returns it.
      base, task: base_model_name_or_path and task_type of the config, as "gpt2" and "CAUSAL_LM".

    Returns: the folder.

    Raises:
      ValueError: params are not those of the module.
    """
    layers, folder = adapted(module), Path(path)
    mine = adapters_of(params)
    if sorted(mine) != sorted(f"{name}.{own}.weight" for name, _ in layers for own in ("lora_A", "lora_B")):
        raise ValueError(
            "save_adapters: the parameters are not those of this module with adapters; give what step.params(state)"
            " returned, and the module that lora.module returned"
        )
    turned = {layer.turned for _, layer in layers}
    config = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": "|".join(re.escape(name) for name, _ in layers),  # fullmatch
        "fan_in_fan_out": turned == {True},
        "bias": "none",
        "base_model_name_or_path": base,
        "task_type": task,
        "inference_mode": True,
        **OTHER,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: x.detach().cpu().contiguous() for name, x in mine.items()}
    safetensors.torch.save_file(tensors, folder / FILE, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    return folder


def load_adapters(path: str | Path, lora: Lora, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's parameters with the adapters of a folder that PEFT or save_adapters wrote; for step.init or step.set.

    Raises:
      CheckpointError: there is no such file; its rank, scale or kind of adapter is another; it lacks an adapter of
        params, or has one that they lack.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / CONFIG).read_text())
        found = safetensors.torch.load_file(folder / FILE)
    except Exception as e:  # whatever a reader makes of a malformed file
        raise CheckpointError(
            f"load_adapters: {str(folder)!r} cannot be read ({str(e)[:300]}); give a folder with {CONFIG} and {FILE}"
        ) from None
    wanted: dict[str, Any] = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none", **OTHER}
    for key, want in wanted.items():
        have = config.get(key, want)
        if have != want and (have or want):
            raise CheckpointError(
                f"load_adapters: {str(folder / CONFIG)!r} says {key}={have!r}, but these adapters have {want!r}; write"
                " fz.lora with its numbers, or merge it with PEFT first"
            )
    mine = adapters_of(params)
    given = {name.removeprefix(PREFIX): x for name, x in found.items()}
    # PEFT writes an adapted head's own weight as well, which counts as the file says
    if odd := sorted((given.keys() - params.keys()) | (mine.keys() - given.keys())):
        where = "the file" if odd[0] in mine else "the parameters"
        raise CheckpointError(f"load_adapters: {odd[0]!r} is not in {where}; write fz.lora with the file's match")
    for name, x in given.items():
        if x.shape != params[name].shape:
            have, want = tuple(x.shape), tuple(params[name].shape)
            raise CheckpointError(f"load_adapters: {name!r} has shape {have} in the file and {want} in the parameters")
    return {**params, **{name: x.to(params[name]) for name, x in given.items()}}

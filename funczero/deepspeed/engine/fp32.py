"""Plain float32 weights out of an engine's checkpoint, under the names of DeepSpeed's zero_to_fp32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from funczero.checkpoint import CheckpointError, manifest
from funczero.checkpoint.export import export
from funczero.checkpoint.restore import load_client
from funczero.deepspeed.engine.beside import split


def checkpoint_of(directory: str | Path, tag: Any = None) -> Path:
    """The folder of a tag; without one of what `latest` says.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    root = Path(directory)
    if tag is None and (root / "latest").is_file():
        tag = (root / "latest").read_text().strip()
    where = root if tag is None else root / str(tag)
    if not where.is_dir():
        raise CheckpointError(f"zero_to_fp32: there is no checkpoint {str(where)!r}; name its folder and its tag")
    return where


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: Any = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, Tensor]:
    """The module's state_dict on the CPU: masters in float32, tied names with one value, and persistent buffers.

    Args:
      checkpoint_dir: as given to engine.save_checkpoint.
      exclude_frozen_parameters: trained parameters alone; of a checkpoint that was saved without the others that is
        all there is.
      lazy_mode: DeepSpeed's promise of values read later; here they are read at once.

    Source: DeepSpeed 0.19.8, deepspeed/utils/zero_to_fp32.py.
    """
    where = checkpoint_of(checkpoint_dir, tag)
    with tempfile.TemporaryDirectory() as folder:
        (file,) = export(where, Path(folder, "weights.safetensors"), dtype="float32")
        weights = {name: x.clone() for name, x in safetensors.torch.load_file(file).items()}
    _, beside = split(load_client(where, manifest.load(where)))
    if exclude_frozen_parameters:
        if "frozen" not in beside:
            why = "this checkpoint does not say which parameters were frozen"
            raise ValueError(f"zero_to_fp32: exclude_frozen_parameters=True, but {why}; leave it out")
        weights = {n: x for n, x in weights.items() if n not in beside["frozen"]}
    buffers = beside.get("buffers", {})
    return weights | {name: buffers[name] for name in beside.get("persistent", buffers) if name in buffers}


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: int | str | None = None,
    safe_serialization: bool = True,
    tag: Any = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes `model.safetensors` into a folder, whole.

    Args:
      max_shard_size: refused; `funczero export` writes shards.
      safe_serialization: False is refused: a pickle is never written here.
    """
    if not safe_serialization or max_shard_size is not None:
        why = "one safetensors file is written here"
        raise ValueError(
            f"zero_to_fp32: {why}; leave safe_serialization and max_shard_size out, or use funczero export"
        )
    found = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    plain = {name: x.contiguous() for name, x in found.items()}
    safetensors.torch.save_file(plain, Path(output_dir, "model.safetensors"), {"format": "pt"})


def load_state_dict_from_zero_checkpoint(model: nn.Module, checkpoint_dir: str | Path, tag: Any = None) -> nn.Module:
    """The model on the CPU with the weights of a checkpoint, whose names must be the model's."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag))
    return model

"""Which kind of file or folder a source is, and its leaves."""

from __future__ import annotations

from pathlib import Path

from funczero.checkpoint import stock
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats import dcp, safe, torch_file, zero_files
from funczero.checkpoint.formats.leaf import Found
from funczero.checkpoint.formats.naming import Taken, by_path

TORCH = (".pt", ".pth", ".bin", ".ckpt")
KINDS = (
    "a .safetensors file, its index or a folder of them, a file of torch.save, a folder of"
    " torch.distributed.checkpoint, one that DeepSpeed's engine saved, or an orbax tree"
)


def read(source: Path, want: Taken, zeros: bool = False) -> Found:
    """The leaves of a source of any kind that is known.

    Raises:
      CheckpointError: it is none, or cannot be read.
    """
    if not source.exists():
        raise CheckpointError(f"import: {str(source)!r} cannot be read (No such file or folder); give {KINDS}")
    if source.is_dir():
        if dcp.is_one(source):
            return dcp.read(source, want)
        if (tag := zero_files.tag_of(source)) is not None:
            return zero_files.read(tag, want)
    if bins := _bins(source):
        items = [item for file in bins for item in torch_file.flat(torch_file.read(file))]
        return by_path(items, want, str(source))
    if safe.files_of(source):
        return by_path((((key,), x) for key, x in safe.read(source).items()), want, str(source))
    if source.is_file():
        raise CheckpointError(f"import: {str(source)!r} cannot be read; give {KINDS}")
    return Found(stock.read(source, zeros))  # an orbax tree has its own paths


def _bins(source: Path) -> list[Path]:
    """Files of torch.save: one, Hugging Face's older shards, or none where safetensors lie beside them."""
    if source.suffix in TORCH:
        return [source]
    if source.name.endswith(".bin.index.json"):
        return sorted(set(safe.weight_map(source).values()))
    if not source.is_dir() or any(source.glob("*.safetensors")):
        return []
    index = source / "pytorch_model.bin.index.json"
    if index.exists():
        return sorted(set(safe.weight_map(index).values()))
    return sorted(source.glob("pytorch_model.bin"))

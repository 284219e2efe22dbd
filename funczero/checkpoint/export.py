"""Plain weights out of a checkpoint, one leaf in memory at a time: safetensors, Hugging Face's folders, folders of
torch.distributed.checkpoint, and files of torch.save.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funczero.checkpoint import manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats import out_dcp, out_safe, out_torch
from funczero.checkpoint.formats.begun import begun
from funczero.checkpoint.formats.entry import Entry
from funczero.checkpoint.formats.naming import FIELDS, OWNERS
from funczero.checkpoint.manifest import Manifest
from funczero.checkpoint.memory import floating, torch_dtype
from funczero.checkpoint.names import state_dict_key
from funczero.checkpoint.reader import opened
from funczero.checkpoint.restore import read_whole
from funczero.checkpoint.tools import find
from funczero.transforms.model_state import MODEL

SUFFIXES = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch"}
FORMATS = ("safetensors", "huggingface", "dcp", "torch")


def export(
    path: str | Path,
    out: str | Path,
    dtype: str | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    *,
    format: str | None = None,
    config: str | Path | None = None,
    exclude: str | None = None,
    tied: str | None = None,
    moments: bool = False,
    prefix: str | None = None,
) -> list[Path]:
    """The parameters of a checkpoint for others; and the model's own state, as a module's state_dict has buffers (one
    that is not persistent is there, too; one that is tied has its first name).

    Args:
      path: a checkpoint, or a folder of them, for the latest.
      out: a file that ends in .safetensors, .pt, .pth or .bin; with format "huggingface" or "dcp" a folder. Of
        safetensors in shards its name gets numbers, and an index is written beside.
      dtype: of all floating parameters; None: as they are.
      shard_size: bytes of a file; None: one file, and 5 GB in Hugging Face's folders.
      overwrite: replace what is there.
      format: one of "safetensors", "huggingface", "dcp" and "torch"; None: by the end of `out`.
      config: the model's config.json, or the folder of the model it began as, for "huggingface". What that folder has
        and no update moves, as statistics of a batch norm in evaluation, is written from there, in print.
      exclude: a regex; parameters whose keys it is found in are left out, by all their names.
      tied: "all" names of a tied parameter have its values, or the "first" alone, as save_pretrained keeps it; None:
        "first" for "huggingface", else "all".
      moments: with "dcp" and "torch" also the optimizer's state by leaf, under "optim" beside the parameters under
        "model", as torch's get_state_dict names it.
      prefix: with "dcp" and "torch" the key that the parameters lie under; None: "model" with moments, else none.

    Returns: the files; of "dcp" the folder.

    Raises:
      ValueError: an argument does not fit the format, a dtype has no name in it, a regex finds nothing.
      CheckpointError: the checkpoint holds no parameters, two would have one key, or a leaf is damaged; `dtype` is no
        floating one, or ends before a value.
      FileExistsError: something is there already.
    """
    where, out = find(path), Path(out)
    found = manifest.load(where)
    kind = _format(out, format, moments, prefix, config, shard_size)
    first = (tied or ("first" if kind == "huggingface" else "all")) == "first"
    if tied not in (None, "first", "all"):
        raise ValueError(f"export: tied={tied!r} is neither 'first' nor 'all'; write one of them")
    entries = _entries(where, found, None if dtype is None else floating(dtype), exclude, first)
    kept = _moments(found, {e.name for e in entries}, where) if moments else []
    others: dict[Entry, Tensor] = {}
    if kind == "huggingface":
        others = begun(Path(config or ""), entries, {state_dict_key(n) for n in found.ties}, exclude)
    entries += others
    read = _reader(where, found, others)
    if kind in ("safetensors", "huggingface"):
        return _safetensors(entries, out, read, kind, shard_size, overwrite, config)
    _refuse(out, overwrite, folder=kind == "dcp")
    tree = _tree(entries, kept, ("model" if moments else "") if prefix is None else prefix)
    if kind == "torch":
        out_torch.write(tree, out, read)
    else:
        out_dcp.write(tree, out, read)
    return [out]


def _format(
    out: Path, format: str | None, moments: bool, prefix: str | None, config: Any, shard_size: int | None
) -> str:
    kind = format or SUFFIXES.get(out.suffix)
    if kind not in FORMATS:
        told = f"format={format!r} is none" if format else f"{str(out)!r} does not end in {', '.join(SUFFIXES)}"
        raise ValueError(f"export: {told}; write --format=huggingface or --format=dcp for a folder")
    if kind == "safetensors" and out.suffix != ".safetensors":
        raise ValueError(f"export: {str(out)!r} does not end in .safetensors")
    if (moments or prefix) and kind not in ("dcp", "torch"):
        raise ValueError("export: safetensors hold parameters alone; moments and prefix are for --format=dcp and torch")
    if shard_size is not None and kind not in ("safetensors", "huggingface"):
        raise ValueError(f"export: shard_size is for safetensors, not for --format={kind}; leave it out")
    if (config is not None) != (kind == "huggingface"):
        raise ValueError(
            "export: --format=huggingface and --config belong together; write --config=FOLDER, the model it began as"
        )
    return kind


def _entries(where: Path, found: Manifest, dtype: torch.dtype | None, exclude: str | None, first: bool) -> list[Entry]:
    """What is written, in the checkpoint's order."""
    masters = {n: n for n in found.arrays if n == "params" or n.startswith("params/")}
    if not masters:
        raise CheckpointError(f"export: {str(where)!r} holds no parameters")
    buffers = {n.removeprefix(f"{MODEL}/"): n for n in found.arrays if n.startswith(f"{MODEL}/values/")}
    ties = {} if first else found.ties
    out = []
    for name, source in (masters | ties | buffers).items():
        a = found.arrays[source]
        have = torch_dtype(a.dtype)
        want = dtype if dtype is not None and have.is_floating_point and name in (masters | ties) else have
        out.append(Entry(state_dict_key(name) or "weight", source, want, a.shape))
    if exclude is not None:
        try:
            gone = {e.name for e in out if re.search(exclude, e.key)}
        except re.error as e:
            raise ValueError(
                f"export: exclude={exclude!r} is no regex ({e}); write one that is found in keys"
            ) from None
        if not gone or len(gone) == len({e.name for e in out}):
            what = "every key" if gone else "no key"
            raise ValueError(
                f"export: exclude={exclude!r} is found in {what}; they begin with {[e.key for e in out][:4]}"
            )
        out = [e for e in out if e.name not in gone]
    if twice := [key for key, n in Counter(e.key for e in out).items() if n > 1]:
        raise CheckpointError(
            f"export: two leaves of {str(where)!r} would both be called {twice[0]!r}; rename one of them"
        )
    return out


def _moments(found: Manifest, kept: set[str], where: Path) -> list[Entry]:
    """The states by leaf of the optimizers that torch has, too, with their counts as `step`.

    Raises:
      CheckpointError: an optimizer keeps what torch has no name for, or there is none.
    """
    names = {owner: {FIELDS[f]: f for f in fields} for fields, owner in OWNERS.items()}
    names["adam"] = names["adamw"]
    out: list[Entry] = []
    for name, a in found.arrays.items():
        head, field, *below = [*name.split("/"), ""]
        leaf = "/".join(("params", *below[:-1]))
        if not below[:-1] or field == "rates" or f"{head}/count" not in found.arrays or leaf not in found.arrays:
            continue
        own = names.get(head.partition("#")[0], {})
        if field not in own or a.shape != found.arrays[leaf].shape:
            raise CheckpointError(
                f"export: {name!r} of {str(where)!r} is an optimizer's state that torch's have no name for; leave out"
                " --moments"
            )
        if leaf in kept:
            key, count = state_dict_key(leaf) or "weight", found.arrays[f"{head}/count"]
            out.append(Entry(key, name, torch_dtype(a.dtype), a.shape, own[field]))
            step = Entry(key, f"{head}/count", torch_dtype(count.dtype), count.shape, "step")
            out += [step] * (step not in out[-3:])
    if not out:
        raise CheckpointError(f"export: {str(where)!r} holds no optimizer's state by leaf; leave out --moments")
    return out


def _tree(entries: list[Entry], kept: list[Entry], prefix: str) -> dict[str, Any]:
    """The nested dict of a file: parameters, below a prefix or not, and the optimizer's state by key."""
    plain: dict[str, Any] = {e.key: e for e in entries}
    if not prefix and not kept:
        return plain
    states: dict[str, dict[str, Entry]] = {}
    for e in kept:
        states.setdefault(e.key, {})[e.field] = e
    return {prefix or "model": plain, **({"optim": {"state": states}} if kept else {})}


def _reader(where: Path, found: Manifest, others: Mapping[Entry, Tensor]) -> Callable[[Entry], Tensor]:
    """Reads one leaf whole, checked, in the dtype that is written.

    Args:
      others: those that are not the checkpoint's.
    """
    reader = opened(where / manifest.ARRAYS, found.arrays)

    def read(e: Entry) -> Tensor:
        if e in others:
            return others[e]
        return read_whole(reader, e.name, found.arrays[e.name], e.dtype)

    return read


def _safetensors(
    entries: list[Entry], out: Path, read: Callable[[Entry], Tensor], kind: str, limit: int | None, overwrite: bool,
    config: Any,
) -> list[Path]:  # fmt: skip
    texts: Mapping[str, str] = {}
    folder = out
    if kind == "huggingface":
        texts, limit = out_safe.configs(Path(config), entries), limit or out_safe.LARGEST
        if out.suffix in SUFFIXES or out.is_file():
            raise ValueError(f"export: {str(out)!r} is no folder, which --format=huggingface writes; name a folder")
        out = folder / "model.safetensors"
    shards = out_safe.files(entries, out, limit)
    more = [folder / name for name in texts] + [out_safe.index_of(out)] * (len(shards) > 1)
    for file in (*shards, *more):
        _refuse(file, overwrite, folder=False)
    if kind == "huggingface":
        _refuse_strays(folder, {*shards, *more}, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
    out_safe.write(shards, out, read)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return list(shards)


def _refuse(file: Path, overwrite: bool, folder: bool) -> None:
    if not file.exists() and not file.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"export: {str(file)!r} is there already; choose another name, or write --overwrite")
    if folder and not (file / ".metadata").is_file():
        raise FileExistsError(f"export: {str(file)!r} is no folder of that format, which --overwrite does not remove")
    if folder:
        shutil.rmtree(file)


def _refuse_strays(folder: Path, mine: set[Path], overwrite: bool) -> None:
    """Weights that lie in a model's folder from before would be read in place of these, or with them."""
    stray = [p for p in folder.glob("*.safetensors*") if p not in mine] + list(folder.glob("pytorch_model*"))
    if stray and not overwrite:
        raise FileExistsError(
            f"export: {str(stray[0])!r} is there already, and a reader may take it for these weights; choose another"
            " folder, or write --overwrite"
        )
    for p in stray:
        p.unlink()

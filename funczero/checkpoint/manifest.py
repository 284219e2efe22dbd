"""What a checkpoint says of itself: one JSON file beside the arrays, its sha256 in another, and the sizes of all
files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import stat
import zlib
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

from funczero.checkpoint.arrays import Array
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.memory import torch_dtype
from funczero.checkpoint.names import LONGEST
from funczero.core.version import version_of

FILE, SEAL, ARRAYS = "funczero.json", "funczero.sha256", "state"
STAMPED, LAST = "_CHECKPOINT_METADATA", "commit_success.txt"  # orbax's own: completed, and written, after the seal
FORMAT = 1
SMALL = 1 << 20  # bytes; files of chunks up to here are checked whole, larger ones by their chunks
LIMIT = 64 << 20  # bytes of the JSON file that a reader takes
VALUE = 24  # bytes of that limit for each value: what Python makes of one takes several times as much
DIMS = 32  # of an array, as the store has it
FORM = {
    "name": str, "sequence": int, "step": int, "updates": int, "arrays": dict, "ties": dict, "metrics": dict,
    "world": int, "window": dict, "about": dict, "versions": dict, "files": dict,
}  # fmt: skip
ABOUT = {"chain": str, "specs": dict, "not finite": list}  # of what it may say there
RANGES = {"sequence": (0, 1 << 63), "step": (0, 1 << 63), "updates": (0, 1 << 63), "world": (1, 1 << 31)}


class Manifest(NamedTuple):
    """A checkpoint without its arrays."""

    name: str
    sequence: int  # of commits in its folder; the largest is the latest
    step: int
    updates: int
    arrays: dict[str, Array]
    ties: dict[str, str]  # another name of a leaf -> the stored one
    metrics: dict[str, float]
    client: Any  # encoded (client.py)
    world: int  # ranks that wrote it
    window: dict[str, Any]  # a streamed accumulate in mid-window: its transform -> how its partial sums lie
    about: dict[str, Any]  # chain, specs, config: what a reader may want to know, and nothing else needs
    versions: dict[str, str]
    files: dict[str, tuple[int, int | None]] = {}  # path -> (bytes, crc32 of the small ones)


@cache
def versions() -> dict[str, str]:
    """What wrote this."""
    packages = "funczero", "torch", "orbax-checkpoint", "tensorstore"
    return {name: version_of(name, "not installed") for name in packages} | {"python": platform.python_version()}


def seal(folder: Path, manifest: Manifest, limit: int = LIMIT) -> None:
    """Write a checkpoint's manifest when all else is there.

    Raises:
      CheckpointError: it is larger than what a reader takes.
    """
    files = {}
    for path in _files(folder):
        size = path.stat().st_size
        late, chunks = path.name == STAMPED, path.parent.name == "d"
        files[path.relative_to(folder).as_posix()] = (
            -1 if late else size,
            None if chunks and size > SMALL else _crc(path),
        )
    body = manifest._replace(files=files)._asdict() | {
        "format": FORMAT,
        "arrays": {n: a._asdict() for n, a in manifest.arrays.items()},
    }
    text = json.dumps(body, allow_nan=True, ensure_ascii=True, separators=(",", ":")).encode()
    if heavy := _heavy(text, limit):
        raise CheckpointError(
            f"save: {FILE} {heavy}; give large parts of a client state as tensors or numpy arrays, or raise"
            " max_metadata= here and where it is restored"
        )
    for name, said in ((FILE, text), (SEAL, _sum(text))):
        with (folder / name).open("wb") as f:
            f.write(said)
            f.flush()
            os.fsync(f.fileno())


def _heavy(text: bytes, limit: int) -> str:
    """Why reading a manifest would take more memory than its limit stands for; counted before anything is made of
    it.
    """
    values = sum(map(text.count, (b",", b":", b"[", b"{")))
    if len(text) > limit:
        return f"has {len(text)} bytes, more than {limit}"
    return f"holds {values} values, more than {most}" if values > (most := max(limit, LIMIT) // VALUE) else ""


def _sum(text: bytes) -> bytes:
    """The checksum's file, as `sha256sum --check` reads it."""
    return f"{hashlib.sha256(text).hexdigest()}  {FILE}\n".encode()


def content(path: Path, limit: int = LIMIT) -> bytes:
    """A file's content; OSError where it is no regular file (a reader of a pipe would wait), or longer than `limit`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, more than {limit}", str(path))
    return path.read_bytes()


def _crc(path: Path) -> int:
    """A checksum of a file; of orbax's own without the time of the commit, which is filled in between the seal and
    the rename.
    """
    text = content(path)
    if path.name == STAMPED:
        text, n = re.subn(rb'"commit_timestamp_nsecs": ?(null|[0-9]{1,20})', b"", text)
        text += b"%d" % n
    return zlib.crc32(text)


def _files(folder: Path) -> list[Path]:
    late = (folder / FILE, folder / SEAL)
    return [p for p in sorted(folder.rglob("*")) if p not in late and (p.is_symlink() or not p.is_dir())]


def load(folder: Path, limit: int = LIMIT) -> Manifest:
    """A checkpoint's manifest, its checksum and its form checked.

    Raises:
      CheckpointError: there is none, it is damaged, or it asks for what no checkpoint holds.
    """
    path = folder / FILE
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(
                f"checkpoint {str(folder)!r}: {FILE} has {size} bytes, more than {limit}; raise max_metadata= if you"
                " trust it"
            )
        text, sums = content(path, limit), content(folder / SEAL, 1024)
    except OSError as e:
        raise CheckpointError(f"checkpoint {str(folder)!r}: {e.filename} cannot be read ({e.strerror})") from None
    if sums != _sum(text):
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: {FILE} does not have the sha256 that {SEAL} names; one of them was changed or"
            " damaged"
        )
    if heavy := _heavy(text, limit):
        raise CheckpointError(f"checkpoint {str(folder)!r}: {FILE} {heavy}; raise max_metadata= if you trust it")
    try:
        return _parse(json.loads(text), folder)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: {FILE} has not the form of a manifest ({type(e).__name__}: {str(e)[:200]})"
        ) from None


def _parse(body: dict[str, Any], folder: Path) -> Manifest:
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has format {body['format']!r}, this version reads {FORMAT}; use the funczero"
            f" that wrote it ({body.get('versions')})"
        )
    if wrong := _wrong(body):
        raise TypeError(f"{wrong[0]!r} holds other things than a save writes")
    for name, (low, high) in RANGES.items():
        if not low <= body[name] < high:
            raise ValueError(f"{name!r} is no number that a save writes")
    strange = next(
        (n for n, stored in body["ties"].items() if stored not in body["arrays"] or not n.startswith("params/")), None
    )
    if strange is not None:
        raise ValueError(f"the tie {_safe(strange, folder)[:80]!r} leads to no leaf")
    body["metrics"] = {k: float(x) for k, x in body["metrics"].items()}
    arrays = {name: _array(_safe(name, folder), a, folder) for name, a in body["arrays"].items()}
    files = {_safe(path, folder): (int(size), crc) for path, (size, crc) in body["files"].items()}
    most, asked = sum(size for size, _ in files.values()), sum(
        prod(a.shape) * torch_dtype(a.dtype).itemsize for a in arrays.values()
    )
    if asked > most:  # nothing is compressed
        raise CheckpointError(f"checkpoint {str(folder)!r}: its leaves would have {asked} bytes, its files have {most}")
    return Manifest(
        **{f: body[f] for f in Manifest._fields if f not in ("arrays", "files")}, arrays=arrays, files=files
    )


def _wrong(body: dict[str, Any]) -> list[str]:
    """The fields that hold values of another kind than a save writes."""
    wrong = [k for k, kind in FORM.items() if type(body[k]) is not kind]
    if wrong:
        return wrong
    inside = (("ties", str), ("metrics", (int, float)))
    wrong += [k for k, kinds in inside if not all(isinstance(x, kinds) for x in body[k].values())]
    wrong += ["window"] * (not wrong and not all(map(_is_window, body["window"].values())))
    if wrong:
        return wrong
    about = body["about"]
    wrong = [k for k, kind in ABOUT.items() if k in about and type(about[k]) is not kind]
    return wrong + ["not finite"] * (not wrong and not all(isinstance(x, str) for x in about.get("not finite", ())))


def _is_window(w: Any) -> bool:
    sums = w.get("partial") if isinstance(w, dict) and isinstance(w.get("count"), int) else None
    return isinstance(sums, list) and all(isinstance(p, dict) and "spec" in p for p in sums)


def _array(name: str, a: dict[str, Any], folder: Path) -> Array:
    """A leaf's entry, its sizes and the number of its chunks checked, so that nobody counts to what no store holds."""
    shape, chunk, tails = tuple(a["shape"]), tuple(a["chunk"]), dict(a["tails"])
    if (
        len(shape) != len(chunk)
        or len(shape) > DIMS
        or not all(type(n) is int and n >= 0 for n in shape)
        or not all(type(n) is int and n > 0 for n in chunk)
    ):
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: leaf {name!r} has shape {str(list(shape))[:80]} in chunks"
            f" {str(list(chunk))[:80]}, which no array has"
        )
    if any(c > max(1, n) for n, c in zip(shape, chunk, strict=True)):  # a reader makes room for whole chunks
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: leaf {name!r} of shape {str(list(shape))[:80]} has chunks of"
            f" {str(list(chunk))[:80]}, which are larger than itself"
        )
    try:
        torch_dtype(a["dtype"])
    except (CheckpointError, TypeError):
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: leaf {name!r} has dtype {a['dtype']!r}, which is none of this torch"
        ) from None
    if len(tails) != (count := prod(ceil(n / c) for n, c in zip(shape, chunk, strict=True))):
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: leaf {name!r} has {count} chunks and {len(tails)} checksums"
        )
    return Array(shape, a["dtype"], chunk, tails)


def _safe(name: str, folder: Path) -> str:
    """A relative path that stays inside its folder."""
    if (
        not name
        or len(name) > 2 * LONGEST
        or name.startswith("/")
        or "\x00" in name
        or "\\" in name
        or ".." in name.split("/")
    ):
        raise CheckpointError(f"checkpoint {str(folder)!r}: {name[:100]!r} is no name of a leaf or file inside it")
    return name


def check_files(folder: Path, manifest: Manifest, strangers: bool = False, quick: bool = False) -> list[str]:
    """What is wrong with the files of a checkpoint, a sentence each: missing ones, other sizes, other contents of small
    ones.

    Args:
      strangers: also name what was put there.
      quick: pass over the contents of files of chunks.
    """
    problems = []
    for path, (size, crc) in manifest.files.items():
        file = folder / path
        try:
            have = file.stat().st_size
            if have != size >= 0:
                problems.append(f"file {path!r} has {have} bytes instead of {size}")
            elif crc is not None and not (quick and file.parent.name == "d") and _crc(file) != crc:
                problems.append(f"file {path!r} was changed or damaged")
        except OSError as e:
            problems.append(f"file {path!r} cannot be read ({e.strerror})")
    if not strangers:
        return problems
    there = {p.relative_to(folder).as_posix() for p in _files(folder)}
    problems += [f"file {LAST!r} is missing"] * (LAST not in there)
    return problems + [f"file {path!r} does not belong to it" for path in sorted(there - {LAST} - set(manifest.files))]

"""A folder of checkpoints: what is committed, which is the latest and the best, and what may go.

A commit is one rename. Its order is a number in the manifest, so names are free, and a run that was rolled back saves
again. A name that is saved anew is written beside (`.funczero-new`) and swapped; what is deleted is renamed first
(`.funczero-deleted`). So at any moment a reader finds each checkpoint whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging

from funczero.checkpoint import manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.manifest import LIMIT, Manifest
from funczero.core.number import shown

NEW, DELETED, TEMPORARY = ".funczero-new", ".funczero-deleted", ".orbax-checkpoint-tmp"
# one of them says that a folder means to be a checkpoint
MARKS = (manifest.FILE, manifest.SEAL, manifest.ARRAYS, manifest.STAMPED)


class Entry(NamedTuple):
    """A committed checkpoint."""

    path: Path
    manifest: Manifest


class Listing(NamedTuple):
    """What a folder holds."""

    entries: list[Entry]  # in order of commit
    damaged: dict[str, str]  # folders that mean to be checkpoints and are not whole -> why
    half: list[str]  # what interrupted saves left
    other: list[str]


class Keep(NamedTuple):
    """What stays: the last `last`, every `period`-th step, and the best by a metric."""

    last: int | None = None
    period: int | None = None
    best: tuple[str, str] | None = None  # (metric, "min" or "max")


def check_name(name: object) -> str:
    """A checkpoint's name as its folder is called; ValueError where it cannot be one."""
    text = str(name)
    bad = (
        not text
        or text != text.strip()
        or text.startswith(".")
        or not text.isprintable()
        or "/" in text
        or "\\" in text
        or len(text.encode(errors="replace")) > 200
    )
    if (
        isinstance(name, bool)
        or not isinstance(name, (str, int, float))
        or bad
        or text.endswith((NEW, DELETED, TEMPORARY))
        or text in ("latest", "best")
    ):
        raise ValueError(
            f"save: {shown(name)} cannot name a checkpoint; use a number or a printable tag without '/' and spaces"
            " around it, other than 'latest' and 'best'"
        )
    return text


def listing(directory: Path, limit: int = LIMIT) -> Listing:
    """Everything in a folder of checkpoints, by what it is; a folder that is not there is empty."""
    out = Listing([], {}, [], [])
    found: dict[str, Entry] = {}
    for path in sorted(p for p in directory.iterdir() if not p.name.startswith(".")) if directory.is_dir() else []:
        if path.name.endswith((TEMPORARY, DELETED)):
            out.half.append(path.name)
        elif not path.is_dir() or not any((path / mark).exists() for mark in MARKS):
            out.other.append(path.name)
        else:
            try:
                entry = Entry(path, manifest.load(path, limit))
            except CheckpointError as e:
                out.damaged[path.name] = str(e)
                continue
            name = path.name.removesuffix(NEW)
            if name not in found or found[name].manifest.sequence < entry.manifest.sequence:
                found[name] = entry  # both are there when a swap was interrupted
    out.entries.extend(sorted(found.values(), key=lambda e: e.manifest.sequence))
    return out


def best_of(entries: list[Entry], best: tuple[str, str]) -> Entry | None:
    """The entry of the smallest or largest value of a metric, the earlier of equals; NaN is never best."""
    metric, mode = best
    rated = [e for e in entries if not math.isnan(e.manifest.metrics.get(metric, math.nan))]
    return min(rated, key=lambda e: e.manifest.metrics[metric] * (1 if mode == "min" else -1)) if rated else None


def choose(directory: Path, name: str | int | float, keep: Keep, fallback: bool, limit: int = LIMIT) -> list[Entry]:
    """The checkpoint that a name means, and with `fallback` the earlier ones after it.

    Raises:
      CheckpointError: there is none; it says what was found.
    """
    found = listing(directory, limit)
    if name not in ("latest", "best"):
        first = next((e for e in found.entries if e.path.name.removesuffix(NEW) == str(name)), None)
        if first is None and not (fallback and str(name) in found.damaged):
            raise CheckpointError(
                found.damaged.get(str(name))
                or f"restore: there is no checkpoint {str(name)!r} in {str(directory)!r}; {_told(found, directory)}"
            )
    elif found.damaged and not fallback:
        raise CheckpointError(
            f"{next(iter(found.damaged.values()))}; name another one ({[e.path.name for e in found.entries]}), or ask"
            " for the last good one with fallback=True"
        )
    elif name == "latest":
        first = found.entries[-1] if found.entries else None
    else:
        if keep.best is None:
            raise ValueError(
                "restore: 'best' needs to know by what; write Checkpointer(directory, best=('eval/loss', 'min'))"
            )
        first = best_of(found.entries, keep.best)
        if first is None and found.entries:
            raise CheckpointError(
                f"restore: no checkpoint in {str(directory)!r} has a number for the metric {keep.best[0]!r};"
                f" {_told(found, directory)}"
            )
    for text in found.damaged.values() if fallback else ():
        logging.warning("%s; passed over", text)
    others = [
        e
        for e in reversed(found.entries)
        if e is not first and (first is None or e.manifest.sequence < first.manifest.sequence)
    ]
    out = ([first] if first else []) + (others if fallback else [])
    if not out:
        raise CheckpointError(
            f"restore: there is no complete checkpoint in {str(directory)!r}; {_told(found, directory)}"
        )
    return out


def _told(found: Listing, directory: Path) -> str:
    if not directory.exists():
        return "the folder does not exist"
    kinds = {
        "complete": [e.path.name for e in found.entries],
        "damaged": list(found.damaged),
        "half written": found.half,
        "no checkpoints": found.other,
    }
    told = [f"{kind}: {names[:8]}{' and more' * (len(names) > 8)}" for kind, names in kinds.items() if names]
    return "found " + ", ".join(told) if told else "it is empty"


@contextlib.contextmanager
def saving(directory: Path) -> Iterator[None]:
    """The right to write into a folder, of one process at a time: what others left half may be removed then.

    Raises:
      CheckpointError: another process is saving there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directory / ".funczero-lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"save: another process is saving into {str(directory)!r}; give every run a folder of its own"
            ) from None
        yield
    finally:
        os.close(fd)


def clean(directory: Path, named: set[str], limit: int = LIMIT) -> None:
    """Finish or remove what interrupted saves left; what only looks like it is left alone, and named once.

    Args:
      named: what was said already.
    """
    for path in sorted(directory.iterdir()):
        if path.name.endswith(NEW):
            if _is_ours(path) and _complete(path, limit):
                swap(path, path.with_name(path.name.removesuffix(NEW)))
            else:
                _leave(path, "no checkpoint that was written beside another", named)
    for path in sorted(directory.iterdir()):
        if path.name.endswith((TEMPORARY, DELETED)):
            if _is_ours(path):
                shutil.rmtree(path)
            else:
                _leave(path, "no folder of an interrupted save", named)


def _is_ours(path: Path) -> bool:
    """Is it a folder itself? A save makes neither files nor links."""
    return path.is_dir() and not path.is_symlink()


def replaceable(path: Path) -> bool:
    """Is it a checkpoint, or an empty folder?"""
    return _is_ours(path) and (any((path / mark).exists() for mark in MARKS) or not any(path.iterdir()))


def _complete(path: Path, limit: int) -> bool:
    try:
        manifest.load(path, limit)
    except CheckpointError:
        return False
    return True


def _leave(path: Path, what: str, named: set[str]) -> None:
    if str(path) not in named:
        named.add(str(path))
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        logging.warning("save: %r is a %s and %s; it is left alone", str(path), kind, what)


def swap(new: Path, final: Path, between: Callable[[], object] = lambda: None) -> None:
    """A checkpoint written beside takes its place.

    Args:
      between: called when the old one has gone and the new one has not come.

    Raises:
      CheckpointError: what is there is no folder.
    """
    if final.is_symlink() or final.exists():
        if not _is_ours(final):
            raise CheckpointError(
                f"save: {str(final)!r} is no folder, so it is not replaced; the new checkpoint stays at {str(new)!r};"
                " move one of them"
            )
        remove(final)
        between()
    new.rename(final)


def remove(path: Path) -> Path:
    """A checkpoint is gone at once; its files follow at the next `clean`, and lie at the path that is returned."""
    gone = path.with_name(path.name + DELETED)
    while gone.is_symlink() or gone.exists() and not _is_ours(gone):  # somebody else's
        gone = gone.with_name("~" + gone.name)
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    return gone


def prune(
    directory: Path,
    keep: Keep,
    named: set[str],
    limit: int = LIMIT,
    passing: Callable[[str], object] = lambda point: None,
) -> None:
    """Remove what is not to be kept. Only whole checkpoints count, by a cheap look at their files; older than the last
    of them that is kept, all may go.

    Law: a damaged checkpoint never takes the place of a whole one; where fewer than `keep.last` are whole, nothing is
    removed.
    """
    if keep.last is None:
        return
    entries: list[Entry] = []
    good: list[Entry] = []
    for e in listing(directory, limit).entries:
        if not _is_ours(e.path):
            _leave(e.path, "not removed with older checkpoints", named)
        else:
            entries.append(e)
    for e in reversed(entries):
        if len(good) == max(1, keep.last):
            break
        if problems := manifest.check_files(e.path, e.manifest, quick=True):
            if str(e.path) not in named:
                named.add(str(e.path))
                logging.warning(
                    "save: checkpoint %r is damaged and does not count for keep=%d: %s",
                    str(e.path),
                    keep.last,
                    problems[0],
                )
        else:
            good.append(e)
    if len(good) < keep.last:
        return
    stay = {e.path for e in entries if e.manifest.sequence >= good[-1].manifest.sequence}
    if keep.period:
        stay |= {e.path for e in entries if e.manifest.step % keep.period == 0}
    rated = list(entries) if keep.best else []
    while keep.best and (first := best_of(rated, keep.best)):
        stay.add(first.path)
        if not manifest.check_files(first.path, first.manifest, quick=True):
            break
        rated.remove(first)  # damaged: the next best stays, too
    for e in entries:
        if e.path not in stay:
            passing("prune")
            gone = remove(e.path)
            passing("pruning")
            shutil.rmtree(gone)

"""Text as bytes on disk, and batches of it as pure functions of (seed, step).

The position in the data is a number of the state (`state.step`), so nothing here has a state of its own: a run that is
resumed, or that runs on other ranks, asks for the same batch and gets the same bytes. Files are mapped into memory
while a window of them is read; nothing is copied or cached on disk. `Batches` promises the same for any map-style
dataset (dataset.py).
"""

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SUFFIXES = (".py", ".txt")
SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__"})
SHARE = 20  # one file in so many is held out


class Piece(NamedTuple):
    """Bytes `start` to `stop` of one file."""

    name: str  # relative to the folder that was asked for
    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Corpus:
    """Pieces of files, read as one string of bytes in their order."""

    pieces: tuple[Piece, ...]

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each piece ends in the string: int64 [pieces]."""
        return np.cumsum([piece.stop - piece.start for piece in self.pieces])

    def __len__(self) -> int:
        return int(self.ends[-1])


def standard_library() -> Path:
    """The folder of Python's own library: some ten megabytes of text on any machine that runs Python."""
    return Path(sysconfig.get_paths()["stdlib"])


def text_files(paths: Sequence[str | Path]) -> list[Piece]:
    """The non-empty files of `paths`: a file as it is, a folder as its .py and .txt files at any depth, sorted by name;
    none twice.

    Raises: FileNotFoundError for a path that is not there, ValueError for one without text.
    """
    found: dict[Path, Piece] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(
                f"data: there is no file or folder {str(path)!r}; give a text file, or a folder that holds"
                f" {' or '.join(SUFFIXES)} files"
            )
        root, files = (path, sorted(_texts(path))) if path.is_dir() else (path.parent, [path])
        wanted = [file for file in files if file.is_file()]
        pieces = [Piece(file.relative_to(root).as_posix(), file, 0, file.stat().st_size) for file in wanted]
        if not any(piece.stop for piece in pieces):
            raise ValueError(
                f"data: {str(path)!r} holds no text; give a file that is not empty, or a folder that holds"
                f" {' or '.join(SUFFIXES)} files"
            )
        for piece in pieces:
            if piece.stop:
                found.setdefault(piece.path.resolve(), piece)
    return list(found.values())


def _texts(folder: Path) -> Iterator[Path]:
    """What has the name of a text; folders that are skipped are not entered: under Python's own library they have most
    of the files.
    """
    for at, folders, names in os.walk(folder, onerror=_stop):
        folders[:] = [name for name in folders if name not in SKIPPED]
        yield from (path for name in names if (path := Path(at, name)).suffix in SUFFIXES)


def _stop(error: OSError) -> None:
    """A folder that cannot be read is told, or its texts would be missing on this rank alone."""
    raise error


def load(paths: Sequence[str | Path] = ()) -> tuple[Corpus, Corpus]:
    """The training and the held-out corpus of `paths` (without any: Python's own library).

    The split is by file, so that no held-out text was trained on: one file in twenty is held out, by a hash of its
    name, whatever else is there. When that leaves a side empty, the file of lowest hash is held out alone. A lone file
    is cut instead: its last twentieth is held out.
    """
    pieces = text_files(paths or [standard_library()])
    if len(pieces) == 1:
        name, path, _, size = pieces[0]
        cut = size - math.ceil(size / SHARE)
        if not cut:
            raise ValueError(f"data: {str(path)!r} holds one byte, too little to train on and hold out; give more text")
        return Corpus((Piece(name, path, 0, cut),)), Corpus((Piece(name, path, cut, size),))
    held = {piece for piece in pieces if _hash(piece.name) % SHARE == 0}
    if not held or len(held) == len(pieces):
        held = {min(pieces, key=lambda piece: (_hash(piece.name), piece.name))}
    return Corpus(tuple(piece for piece in pieces if piece not in held)), Corpus(
        tuple(piece for piece in pieces if piece in held)
    )


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def read(corpus: Corpus, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Windows of `length` bytes that begin at `starts`: uint8 [len(starts), length]. A window may run over the end
    of a file into the next.
    """
    return np.stack([np.concatenate(list(_spans(corpus, int(start), length))) for start in starts])


def _spans(corpus: Corpus, start: int, length: int) -> Iterator[np.ndarray]:
    """The bytes of one window, file by file."""
    index = int(np.searchsorted(corpus.ends, start, side="right"))
    while length:
        piece = corpus.pieces[index]
        first = start - int(corpus.ends[index]) + piece.stop  # place in the file
        taken = min(length, piece.stop - first)
        yield np.asarray(np.memmap(piece.path, np.uint8, mode="r")[first : first + taken])
        start, length, index = start + taken, length - taken, index + 1


def batch(corpus: Corpus, seed: int, step: int, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random windows: {"x", "y"}, int64 [rows, length], y the byte after x. A pure function of its arguments; the
    ranks take their rows of it.
    """
    room = _room(corpus, length)
    return _shifted(read(corpus, np.random.default_rng([seed, step]).integers(room, size=rows), length + 1))


def sample_batches(corpus: Corpus, count: int, rows: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """`count` batches of windows spread evenly over the corpus, the same at every call: what a held-out loss is
    measured on.
    """
    starts = np.linspace(0, _room(corpus, length) - 1, count * rows).astype(np.int64)
    for index in range(count):
        yield _shifted(read(corpus, starts[index * rows : (index + 1) * rows], length + 1))


def _room(corpus: Corpus, length: int) -> int:
    """The number of places where a window of length + 1 bytes can begin."""
    if len(corpus) <= length:
        where = str(corpus.pieces[0].path)
        raise ValueError(
            f"data: the text from {where!r} on holds {len(corpus)} bytes, but a window is {length + 1}; give more text"
            " or a shorter length"
        )
    return len(corpus) - length


def _shifted(window: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "x": torch.from_numpy(window[:, :-1].astype(np.int64)),
        "y": torch.from_numpy(window[:, 1:].astype(np.int64)),
    }


def unigram_entropy(corpus: Corpus) -> float:
    """Bits per byte of a model that knows only how often each byte occurs: -sum p log2 p."""
    pieces = [
        np.bincount(np.memmap(p.path, np.uint8, mode="r")[p.start : p.stop], minlength=256) for p in corpus.pieces
    ]
    counts = np.sum(pieces, axis=0)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())

"""One save on one rank, in a thread of its own: write this rank's chunks; on rank 0 also commit them all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from absl import logging
from torch import Tensor

from funczero.checkpoint import commit, folder, manifest
from funczero.checkpoint.arrays import Array
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.folder import Keep
from funczero.checkpoint.layout import Deal
from funczero.checkpoint.manifest import Manifest
from funczero.checkpoint.memory import give_back, torch_dtype
from funczero.checkpoint.names import Names, listed
from funczero.checkpoint.peers import Peers
from funczero.checkpoint.staging import Held
from funczero.checkpoint.writer import write
from funczero.checkpoint.writing import Filled
from funczero.core.number import dtype_name
from funczero.world.ending import Work

# The name of a point of a save: what is told it, as this rank passes the point, may fail or end the save there.
#   "asked"    inside the call, before anything is looked at
#   "copied"   this rank's part is copied, and training may go on; what follows stands beside it
#   "begun"    rank 0 has not yet taken the folder's lock
#   "made"     orbax's temporary folder is there
#   "chunk"    before every chunk of this rank
#   "written"  all chunks of this rank are on disk
#   "awaits"   this rank has given its word, and waits for the last one of rank 0; so in `restore` and `names`
# and on rank 0
#   "merged"   the ranks' stores are one
#   "sealed"   the manifest is written
#   "renamed"  the checkpoint is there: under its name, or beside the one that it replaces
#   "beside" "between" "swapped"  before, amid and after the swap with one that is replaced
#   "prune" "pruning"  an older one is to be removed, and is renamed but not yet deleted
Passing = Callable[[str], object]

# raised elsewhere as what they are
KINDS = {e.__name__: e for e in (ValueError, TypeError, FileExistsError, OSError, PermissionError)}


class Job(NamedTuple):
    """What a rank has to write, in memory that stays as it is until it is written."""

    number: int  # of the call, the same on all ranks
    directory: Path
    keep: Keep
    limit: int  # of a manifest
    overwrite: bool
    told: Manifest  # without arrays
    arrays: dict[str, Array]
    deal: Deal
    values: Iterable[Held]  # of this rank's pieces, in any order; gone through once where all are its own
    named: set[str]  # what was found in the folder that is not ours, and said already
    passing: Passing


def refuse_taken(directory: Path, name: str, overwrite: bool) -> None:
    """An error where there is a checkpoint of this name, or, with `overwrite`, something that is none."""
    final = directory / name
    there = final.is_symlink() or final.exists()
    if not overwrite and (there or (directory / (name + folder.NEW)).exists()):
        raise FileExistsError(f"save: {str(final)!r} is there already; choose another name, or write overwrite=True")
    if there and not folder.replaceable(final):
        raise FileExistsError(
            f"save: {str(final)!r} is no checkpoint but a link, a file or a folder of other things, which"
            " overwrite=True does not remove; choose another name"
        )


def arrays_of(found: Names, own: Deal) -> dict[str, Array]:
    """Every leaf as the manifest will have it, checksums aside."""
    return {n: Array(p.shape, dtype_name(p.value.dtype), own.chunks[n]) for n, p in found.parts.items()}


class Save(Work):
    """A save from the copy to the commit, beside the training."""

    def __init__(self, job: Job, peers: Peers) -> None:
        """Starts."""
        super().__init__(f"funczero-save-{job.told.name}", f"save {job.told.name!r}")
        self.job, self.peers = job, peers
        self.start()

    def work(self) -> None:
        """Write; on rank 0 also commit."""
        try:
            (_lead if self.peers.rank == 0 else _follow)(self.job, self.peers.aside())
        finally:
            give_back()


def _lead(job: Job, peers: Peers) -> None:
    try:
        odd = _commit(job, peers)
    except BaseException as e:
        with contextlib.suppress(CheckpointError):  # who cannot be reached finds out by itself
            peers.put(f"{job.number}/end", {"error": spoken(e)})
            peers.put(f"{job.number}/dir", None)
        raise
    peers.put(f"{job.number}/end", {"odd": odd})
    _warn(job, odd)


def _follow(job: Job, peers: Peers) -> None:
    what = f"save {job.told.name!r}"
    (where,) = peers.wait([(0, f"{job.number}/dir")], what)
    if where is not None:
        try:
            said: Any = _pieces(Path(where), job, peers)
        except BaseException as e:
            said = {"error": f"rank {peers.rank}: {sentence(e)}"}
        peers.put(f"{job.number}/done/{peers.rank}", said)
        job.passing("awaits")
    (end,) = peers.wait([(0, f"{job.number}/end")], what)
    if end.get("error") is not None:
        kind, text = end["error"]
        raise KINDS.get(kind, CheckpointError)(text)
    _warn(job, end["odd"])


def _commit(job: Job, peers: Peers) -> list[str]:
    """Rank 0's: orbax's save around everybody's writing, then what may go. Returns the leaves that hold what no
    training should.
    """
    name, tails, odd = job.told.name, {n: dict[str, str]() for n in job.arrays}, dict[str, None]()

    def everybody(path: Path) -> None:
        peers.put(f"{job.number}/dir", str(path))
        mine = _pieces(path, job, peers)
        for theirs in (
            mine,
            *peers.wait([(r, f"{job.number}/done/{r}") for r in range(1, peers.size)], f"save {name!r}"),
        ):
            if "error" in theirs:
                raise CheckpointError(f"save {name!r}: {theirs['error']}")
            odd.update(dict.fromkeys(theirs["odd"]))
            for leaf, keys in theirs["tails"].items():
                tails[leaf] |= keys

    def sealed(path: Path) -> None:
        job.passing("merged")
        last = max((e.manifest.sequence for e in folder.listing(job.directory, job.limit).entries), default=0)
        about = job.told.about | ({"not finite": list(odd)} if odd else {})
        arrays = {n: a._replace(tails=tails[n]) for n, a in job.arrays.items()}
        manifest.seal(path, job.told._replace(sequence=last + 1, arrays=arrays, about=about), job.limit)
        job.passing("sealed")

    job.passing("begun")
    with folder.saving(job.directory):
        folder.clean(job.directory, job.named, job.limit)
        refuse_taken(job.directory, name, job.overwrite)
        final = job.directory / name
        target = final.with_name(name + folder.NEW) if final.exists() else final
        try:
            commit.commit(target, [tuple(n.split("/")) for n in job.arrays], commit.Hooks(everybody, sealed))
        except Exception as e:
            raise (
                e if isinstance(e, (OSError, CheckpointError)) else CheckpointError(f"save {name!r}: {sentence(e)}")
            ) from e
        job.passing("renamed")
        if target != final:
            job.passing("beside")
            folder.swap(target, final, lambda: job.passing("between"))
            job.passing("swapped")
        folder.clean(job.directory, job.named, job.limit)
        folder.prune(job.directory, job.keep, job.named, job.limit, job.passing)
    return list(odd)


def _is_odd(name: str, x: Tensor) -> bool:
    """Does a leaf, not the client's, hold NaN, or, of parameters, infinity?"""
    return not name.startswith("client/") and not sound(x, name.split("/")[0] == "params")


def sound(x: Tensor, finite: bool) -> bool:
    """No NaN in it, nor, with `finite`, infinity."""
    if not (x.is_floating_point() or x.is_complex()) or not x.numel():
        return True
    x = torch.view_as_real(x) if x.is_complex() else x.float() if x.dtype.itemsize == 1 else x
    # one pass, and nothing in new memory
    if isfinite(x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32).item()):
        return True
    return bool((x.isfinite() if finite else ~x.isnan()).all())


def _warn(job: Job, odd: list[str]) -> None:
    if odd:
        verb = "is" if len(odd) == 1 else "are"
        logging.warning(
            "save %r: %s %s not finite in the state at step %d, which was saved as it is",
            job.told.name,
            listed(odd),
            verb,
            job.told.step,
        )


def _pieces(path: Path, job: Job, peers: Peers) -> dict[str, Any]:
    """Send what others write, write what is this rank's: "tails", checksums by leaf and chunk, and "odd", the leaves of
    this rank's pieces that hold what no training should.
    """
    rank, odd = peers.rank, dict[str, None]()
    job.passing("made")
    key_of = lambda p: f"{job.number}/rows/{p.name}/{p.key}/{p.box.start}"
    if any(p.writer != rank for p in job.deal.pieces):
        for piece, x in job.values:
            if piece.writer != rank:
                odd |= {piece.name: None} if _is_odd(piece.name, x) else {}
                peers.put_bytes(key_of(piece), x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    received: list[Filled] = []
    for piece in job.deal.pieces:
        if piece.writer == rank != piece.holder:
            (rows,) = peers.wait([(piece.holder, key_of(piece))], f"save {job.told.name!r}", raw=True)
            x = torch.frombuffer(bytearray(rows), dtype=torch_dtype(job.arrays[piece.name].dtype)).view(piece.box.shape)
            received.append(Filled(piece.name, piece.key, piece.box, x))
    # without values: rank 0 says that they are there
    mine = {p.name for p in job.deal.pieces if p.writer == rank}
    mine |= {n for n, a in job.arrays.items() if rank == 0 and not prod(a.shape)}

    def chunks() -> Iterator[Filled]:
        for p, x in job.values:
            if p.writer == rank:
                odd.update({p.name: None} if _is_odd(p.name, x) else {})
                job.passing("chunk")
                yield Filled(p.name, p.key, p.box, x)
        for chunk in received:
            job.passing("chunk")
            yield chunk

    tails: dict[str, dict[str, str]] = {}
    if mine:
        tails = write(path / f"ocdbt.process_{rank}", {n: a for n, a in job.arrays.items() if n in mine}, chunks())
        job.passing("written")
    return {"tails": tails, "odd": list(odd)}


def sentence(e: BaseException) -> str:
    """An error's text, without places in others' sources."""
    return str(e).split(" [tensorstore", 1)[0].split(" [source locations", 1)[0].strip() or type(e).__name__


def spoken(e: BaseException | None) -> tuple[str, str] | None:
    """An error as it is published."""
    return None if e is None else (type(e).__name__, sentence(e))

"""What this process launched, as one number that all ranks of a mesh compare whenever they sum integers anyway.

Law: ranks that launched the same (verb, axis, units, dtype, bytes) in the same calls (chain, leaves, step, key, scalars
of the state) have the same checksum, and where two differ all ranks raise the same sentence. Numbers of rows and of
local micro-batches stay out: a ragged batch and a short window are right.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funczero.world.difference import DO_THE_SAME, first_difference, ranks_in_words
from funczero.world.entries import Context, Entry
from funczero.world.plain import plain, unpack

KEPT = 1 << 12  # launches remembered for words, since the last sum that agreed
ANSWERS = 1 << 26  # bytes that another rank may say at most
ANSWER = 5.0  # seconds in which the others say what they launched
LISTED = 256  # numbers of a param group that are compared
NAN = -1.0  # stands for a nan among the scalars, whose hash would be its address


class DivergenceError(RuntimeError):
    """Ranks did not do the same; raised on all of them, before anything is applied."""


class Ledger:
    """A mesh's checksum of launches; mutable, shared by all copies of the mesh."""

    def __init__(self) -> None:
        self.place, self.ranks, self.device = 0, 1, torch.device("cpu")
        self.chain: list[str] = []  # the chain in words
        self.replicated: tuple[str, ...] = ()  # axes whose ranks must be given the same rows
        self.context, self.what, self.sum, self.rows = Context("no call"), 0, 0, 0
        self.lr = NAN  # of the last update
        self.entries: deque[Entry] = deque(maxlen=KEPT)  # since the last sum
        self.sealed: deque[Entry] = deque()  # before it, since the last one that agreed
        self.watch: Any = None  # watch.Watch, where launches are also logged for a thread that compares
        self.texts: dict[int, str] = {}  # chains and leaves by checksum
        self.later: Tensor | None = None  # what an accelerator's last sum said, not read yet
        self._known: list[tuple[Any, int, tuple[str, ...]]] = []
        self._plan: tuple[tuple[str, ...], list[tuple[Any, ...]], tuple[str, ...]] = ((), [], ())

    def joined(self, place: int, ranks: int, device: torch.device) -> None:
        """The mesh is live: this process is number `place` of `ranks`; of one there is nothing to compare."""
        simulated = dist.is_initialized() and dist.get_backend() == "fake"  # which sends nothing, and sums nothing
        self.place, self.ranks, self.device = place, 1 if simulated else ranks, device

    # --- what is compared
    def note(self, verb: str, axis: str, dtype: str = "", nbytes: int = 0, units: tuple[int, ...] = ()) -> None:
        """A collective is about to be launched: about half a microsecond."""
        number = hash((self.what, _number(verb), _number(axis), _number(dtype), nbytes, units))
        self.sum = hash((self.sum, number))
        entry = Entry(self.context, verb, axis, dtype, nbytes, units)
        self.entries.append(entry)
        if self.watch is not None:
            self.watch.log.append(entry, number)

    def enter(self, context: Context) -> None:
        """What is launched from here on belongs to this call. A call that launches nothing leaves no trace."""
        self.context = context
        self.what = hash((_number(context.call), context.step, context.key, context.scalars, context.spec))

    def seal(self, axis: str, nbytes: int) -> tuple[int, int]:
        """The checksums of all launches and rows so far, this very sum of integers included, as they go into it."""
        self.note("all_reduce", axis, "int64", nbytes)
        self.sealed.extend(self.entries)
        self.entries.clear()
        rows, self.rows = self.rows, 0
        return self.sum, rows

    def mix_rows(self, numbers: Sequence[int]) -> None:
        """The rows of a call, where ranks must be given the same."""
        self.rows = hash((self.rows, *numbers))

    def agreed(self, table: list[int], groups: list[int] | None = None) -> None:
        """After a sum: every rank's checksum by place, and of its rows; each rank sees the same table.

        Args:
          groups: by place, which ranks must be given the same rows; then the table holds their checksums after those of
            launches.

        Raises:
          DivergenceError: they differ; the sentence is the same on all ranks.
        """
        sums, rows = table[: self.ranks], table[self.ranks :]
        alike = sums.count(sums[0]) == self.ranks
        if alike and (groups is None or len(set(zip(groups, rows, strict=True))) == len(set(groups))):
            self.sealed.clear()
            return
        why = self._other_rows(groups, rows) if alike and groups is not None else self._explain(sums)
        self.entries.clear()
        self.sealed.clear()
        self.sum = 0
        if self.watch is not None:
            self.watch.settled = True
        raise DivergenceError(why)

    def _other_rows(self, groups: list[int], rows: list[int]) -> str:
        first: dict[int, int] = {}
        odd = next(r for r, group in enumerate(groups) if rows[first.setdefault(group, r)] != rows[r])
        return (
            f"rank {odd} was given other rows than rank {first[groups[odd]]} at step {self.context.step}, but the batch"
            f" is not split over {list(self.replicated)}; give all ranks along it the same rows, or split the batch"
            " over it: batch=P(...)"
        )

    # --- words
    def _explain(self, sums: list[int]) -> str:
        """The sentence that all ranks raise: each says in the world's store what it launched, and the first sentence
        counts.
        """
        found = Counter(sums)
        odd = next(p for p, x in enumerate(sums) if x != found.most_common(1)[0][0])
        others = ranks_in_words([p for p in range(self.ranks) if p != odd])
        text = (
            f"rank {odd} launched other collectives than {others} since the last sum, in {self.context.call} at step"
            f" {self.context.step}; {DO_THE_SAME}"
        )
        try:
            store: Any = dist.distributed_c10d._get_default_store()
            at = f"funczero/told/{hash(tuple(sums))}"
            answer = [
                dist.get_rank(),
                [*self.sealed, *self.entries],
                {e.context.spec: self.texts.get(e.context.spec, "") for e in self.sealed},
            ]
            store.set(f"{at}/{self.place}", zlib.compress(json.dumps(answer).encode()))
            keys, until = [f"{at}/{p}" for p in range(self.ranks)], time.monotonic() + ANSWER
            while not store.check(keys) and time.monotonic() < until:
                time.sleep(0.01)
            answers = [unpack(store.get(k), ANSWERS) for k in keys if store.check([k])]
            tails = {rank: list(map(Entry.read, entries)) for rank, entries, _ in answers}
            texts = {int(spec): x for *_, each in answers for spec, x in each.items()}
            text = first_difference(tails, texts) or text
            text = plain(bytes(store.compare_set(f"{at}/verdict", "", text)).decode(errors="replace"))
            heard = store.add(f"{at}/heard", 1)
            while self.place == 0 and heard < self.ranks and time.monotonic() < until:  # it may hold the store
                time.sleep(0.01)
                heard = store.add(f"{at}/heard", 0)
            return text
        except RuntimeError:  # the store is gone, too
            return text

    # --- the call
    def describe(self, structure: Any) -> tuple[int, tuple[str, ...]]:
        """The checksum of the chain and of all leaves, and the units' names."""
        for known, spec, names in self._known:
            if known is structure:
                return spec, names
        units = () if structure is None else structure.units
        text = "\n".join([*self.chain, *map(str, (*units, *(() if structure is None else structure.leaves)))])
        found = zlib.crc32(text.encode()), tuple(u.name for u in units)
        self._known = [(structure, *found), *self._known[:7]]
        self.texts[found[0]] = text
        return found

    def scalars(self, chain: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Names and values of the state's 0-d leaves on the CPU (counters, scales, rates), and of the last learning
        rate.

        A stream's count of local micro-batches is not among them: a short window is right.
        """
        keys = tuple(chain)
        if self._plan[0] != keys:
            leaves = [x for k in keys if not k.startswith("accumulate") for x in _compared(chain[k], (k,))]
            names = [f"{name}[{i}]" if n else name for _, name, n in leaves for i in range(n or 1)]
            self._plan = keys, [path for path, *_ in leaves], (*names, "learning rate of the last update")
        found = [x for path in self._plan[1] for x in _numbers(chain, path)]
        return self._plan[2], (*(x if x == x else NAN for x in found), self.lr)


def _compared(node: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], str, int]]:
    """(path, name, numbers in it or 0 for a scalar) of what ranks compare: 0-d leaves among a state's fields, all
    rates, and the numbers of param groups; on the CPU alone.
    """
    fields = getattr(node, "_fields", ())
    inside = "rates" in path or path[0] == "param_groups"
    children: Any = [(f, getattr(node, f)) for f in fields] if fields else []
    if inside and not fields:
        children = (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else []
        )
    out: list[tuple[tuple[Any, ...], str, int]] = []
    for key, x in children:
        place = (*path, key)
        if not isinstance(x, Tensor):
            out += _compared(x, place) if inside or key == "rates" else []
        elif x.device.type == "cpu" and not (x.dim() and not inside) and x.numel() <= LISTED:
            out.append((place, ".".join(map(str, place)), x.numel() if x.dim() else 0))
    return out


def _numbers(node: Any, path: tuple[Any, ...]) -> list[Any]:
    """The numbers of one leaf; nan where it is no tensor any more, which whoever reads it will say."""
    try:
        for key in path:
            node = getattr(node, key) if hasattr(node, "_fields") and isinstance(key, str) else node[key]
        return [node.item()] if not node.dim() else node.flatten().tolist()
    except (AttributeError, KeyError, IndexError, TypeError):
        return [NAN]


@cache
def _number(name: str) -> int:
    """A name as a number that is the same in every process, as hash(str) is not."""
    return zlib.crc32(name.encode())

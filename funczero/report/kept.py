"""A run's folder, read: its numbers, and what it said of itself; whatever is missing or broken is told."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from funczero.checkpoint import folder as checkpoints
from funczero.report.lines import Lines
from funczero.report.numbers import RATE, Numbers
from funczero.report.series import Series
from funczero.script.record import FILE, FORM, PLAN
from funczero.world.plain import plain

METRICS, EVENTS = "metrics.jsonl", 1 << 12  # events of a kind that are kept
TEXT = 20_000  # characters of a text
LARGE = 1 << 20  # bytes of plan.json

Sending = dict[tuple[str, str, str], int]  # (axis, verb, form) -> bytes


class Skip(NamedTuple):
    """An update that was not applied."""

    update: int
    words: str = ""
    leaf: str = ""
    rank: int = -1
    searching: bool = False

    def __str__(self) -> str:
        more = ", while the loss scale is lowered" if self.searching else ""
        return f"update {self.update:,} skipped: {self.words or 'the run did not say why'}{more}"


class Events:
    """run.jsonl as what still holds: what a later start has undone is gone."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.lines = Lines(path)
        self.form = FORM
        self._forget()

    def _forget(self) -> None:
        self.begins: list[dict[str, Any]] = []
        self.state: dict[str, int] = {}
        self.sent: list[tuple[int, Sending]] = []  # from which update on
        self.skips: dict[int, Skip] = {}
        self.said: list[tuple[int, str]] = []
        self.checkpoints: dict[str, int] = {}  # name -> update
        self.saved = 0.0  # when the last one was committed
        self.end: dict[str, Any] | None = None
        self.full = set[str]()  # kinds of which there are more

    @property
    def about(self) -> dict[str, Any]:
        """What the last start said of itself."""
        return self.begins[-1] if self.begins else {}

    @property
    def resumes(self) -> list[int]:
        """From which updates the run went on."""
        return [begin["update"] for begin in self.begins[1:]]

    def read(self) -> bool:
        """Reads what is new; did the file begin anew?"""
        anew = self.lines.began_anew()
        if anew:
            self._forget()
        for number, record in self.lines.new():
            try:
                self._event(record)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                kind = plain(str(record.get("kind")))[:40]
                self.lines.wrong(number, f"no line of kind {kind!r} ({plain(str(error))[:80]})")
        return anew

    def _event(self, record: Mapping[str, Any]) -> None:
        kind = record["kind"]
        if kind == "begin":
            self._begin(record)
        elif kind == "state":
            self.state = amounts(record["bytes"])
        elif kind == "sent":
            now = sending(record["bytes"])
            if not self.sent or self.sent[-1][1] != now:
                self._put(kind, self.sent, (whole(record, "update"), now))
            self.full |= {kind} if record.get("more") else set()
        elif kind == "skip":
            self._skip(record)
        elif kind == "said":
            self._put(kind, self.said, (whole(record, "update"), text(record, "text")))
            self.full |= {kind} if record.get("more") else set()
        elif kind == "checkpoint":
            name, update = text(record, "name")[:200], whole(record, "update")
            if len(self.checkpoints) >= EVENTS:  # the first ones are of the least interest
                self.full.add(kind)
                del self.checkpoints[next(iter(self.checkpoints))]
            self.checkpoints[name], self.saved = update, moment(record)
        elif kind == "end":
            how = {"update": whole(record, "update"), "how": text(record, "how"), "words": text(record, "words")}
            self.end = {**how, "time": moment(record)}
        else:
            raise ValueError("no such kind")

    def _put(self, kind: str, among: list[Any], what: tuple[int, Any]) -> None:
        if len(among) < EVENTS:
            among.append(what)
        else:
            self.full.add(kind)

    def _begin(self, record: Mapping[str, Any]) -> None:
        update, form = whole(record, "update"), whole(record, "form")
        self.form = max(self.form, form)
        begin: dict[str, Any] = {"update": update, "time": moment(record), "steps": whole(record, "steps")}
        for name in ("before", "script", "unit", "chain", "policy", "about"):
            begin[name] = text(record, name)
        begin["amount"], begin["parameters"] = float(record["amount"]), whole(record, "parameters")
        begin["mesh"] = amounts(record["mesh"])
        for name in ("edges", "environment"):
            begin[name] = {plain(str(k))[:80]: plain(str(x))[:TEXT] for k, x in dict(record[name]).items()}
        shown = lambda x: x if isinstance(x, str) else json.dumps(x)
        flags = dict(record["flags"]).items()
        begin["flags"] = {plain(k)[:80]: (plain(shown(x))[:TEXT], bool(given)) for k, (x, given) in flags}
        self.begins.append(begin)
        self.end = None
        self.skips = {n: skip for n, skip in self.skips.items() if n <= update}
        self.sent = [(n, what) for n, what in self.sent if n <= update]
        self.said = [(n, what) for n, what in self.said if n <= update]
        self.checkpoints = {name: n for name, n in self.checkpoints.items() if n <= update}

    def _skip(self, record: Mapping[str, Any]) -> None:
        update = whole(record, "update")
        if len(self.skips) >= EVENTS:
            self.full.add("skip")
            return
        leaf, rank = text(record, "leaf"), record["rank"]
        if type(rank) is not int:
            raise ValueError("its rank is no number")
        self.skips[update] = Skip(update, text(record, "words"), leaf, rank, record.get("searching") is True)


def whole(record: Mapping[str, Any], name: str) -> int:
    """A number of at least 0."""
    x = record[name]
    if type(x) is not int or not 0 <= x < 2**63:
        raise ValueError(f"{name} is no number of at least 0")
    return x


def text(record: Mapping[str, Any], name: str) -> str:
    """A text, of which line ends stay and what a terminal would obey does not."""
    x = record[name]
    if not isinstance(x, str):
        raise ValueError(f"{name} is no text")
    return "\n".join(plain(line) for line in x[:TEXT].split("\n"))


def moment(record: Mapping[str, Any]) -> float:
    """Unix seconds that a clock of this world may show."""
    x = float(record["time"])
    if not 0 <= x < 1e11:
        raise ValueError("time is none")
    return x


def amounts(given: Any) -> dict[str, int]:
    """Numbers by name."""
    return {plain(str(name))[:80]: whole(given, name) for name in list(dict(given))[:100]}


def sending(rows: Any) -> Sending:
    """Bytes by axis, verb and form."""
    return {
        (plain(axis)[:80], plain(verb)[:80], plain(form)[:80]): whole({"bytes": n}, "bytes")
        for axis, verb, form, n in list(rows)[:1000]
    }


class Kept:
    """One run, as its folder tells of it."""

    def __init__(self, path: Path, name: str) -> None:
        """Looks that there is a run.

        Raises:
          ValueError: the folder is none, or holds no run.
        """
        self.path, self.name = path, name
        if not path.is_dir():
            raise ValueError(f"{str(path)!r} is no folder; write the --out of a run")
        if not (path / METRICS).is_file():
            raise ValueError(f"{str(path)!r} holds no {METRICS}, so it is no run's folder; write the --out of a run")
        self.numbers, self.events = Numbers(path / METRICS), Events(path / FILE)
        self.plan: dict[str, Any] = {}
        self.on_disk: list[str] = []
        self._odd, self._unread = list[str](), ""
        self.read()
        self.look()

    def read(self) -> None:
        """Reads what is new of a run that is under way.

        Raises:
          ValueError: a file cannot be read.
        """
        try:
            self.numbers.read()
        except OSError as error:
            raise ValueError(f"{str(self.path / METRICS)!r} cannot be read ({error.strerror})") from None
        try:
            self.events.read()
            self._unread = ""
        except OSError as error:
            self._unread = f"{FILE}: it cannot be read ({error.strerror})"

    def look(self) -> None:
        """Reads the plan, and which checkpoints there are."""
        self._odd = []
        self.plan, self.on_disk = self._plan(), self._on_disk()

    def _plan(self) -> dict[str, Any]:
        path = self.path / PLAN
        try:
            if path.stat().st_size > LARGE:
                raise ValueError(f"it is larger than {LARGE:,} bytes")
            found = json.loads(path.read_bytes())
            if "why" in found:
                return {"why": text(found, "why")}
            memory = dict(found["memory"])
            at_peak = amounts(memory.pop("at_peak"))
            notes = [plain(str(x)) for x in list(found["notes"])[:20]]
            out = {"sent": sending(found["sent"]), "memory": amounts(memory), "at_peak": at_peak, "notes": notes}
            return out | {"flops": whole(found, "flops")}
        except FileNotFoundError:
            return {"why": f"there is no {PLAN}"}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            self._odd.append(f"{PLAN}: no plan ({plain(str(error))[:80]})")
            return {"why": f"{PLAN} cannot be read"}

    def _on_disk(self) -> list[str]:
        try:
            found = checkpoints.listing(self.path / "checkpoints")
        except OSError as error:
            self._odd.append(f"checkpoints: the folder cannot be read ({error.strerror})")
            return []
        self._odd += [f"checkpoints/{plain(name)}: {plain(why)}" for name, why in found.damaged.items()]
        return [plain(entry.path.name) for entry in found.entries]

    @property
    def recorded(self) -> bool:
        """Did the run say what it is?"""
        return bool(self.events.begins)

    def troubles(self, grows: bool = False) -> list[str]:
        """All that is wrong in the folder.

        Args:
          grows: the run may be under way.
        """
        events, out = self.events, self.numbers.troubles(grows) + self.events.lines.told()
        if events.lines.half and not grows:
            out.append(f"{FILE}: its last line is half-written, and was passed over")
        if events.form > FORM:
            out.append(f"{FILE}: written in form {events.form} by a later funczero; this one knows {FORM}")
        out += [f"{FILE}: more lines of kind {kind} than are kept" for kind in sorted(events.full)]
        return [*out, *[self._unread] * bool(self._unread), *self._odd]

    def age(self) -> float:
        """Seconds since the run last wrote a number."""
        try:
            return max(0.0, time.time() - (self.path / METRICS).stat().st_mtime)
        except OSError:
            return float("inf")

    def seconds(self) -> float | None:
        """Of an update, on average, by its rate; None: not known."""
        rate, amount = self.rate(), self.events.about.get("amount", 0)
        return amount * rate.inverse / rate.count if rate is not None and rate.count and amount > 0 else None

    def left(self) -> int:
        """Updates that are still to come; 0 where the run has ended, or did not say of how many."""
        return max(0, self.events.about.get("steps", 0) - self.numbers.last) if self.events.end is None else 0

    def rate(self) -> Series | None:
        """The series of units a second; None: there is none."""
        unit = self.events.about.get("unit")
        named = [n for n in self.numbers.updates if n.endswith(RATE) and unit in (None, n.removesuffix(RATE))]
        return self.numbers.updates[named[0]] if named else None

    def ended(self) -> str:
        """How the run ended, in words; "" where it did not."""
        end = self.events.end
        return "" if end is None else f"{end['how']} {end['words']}".strip()


def named(paths: list[Path]) -> list[str]:
    """Short names that tell folders apart.

    >>> named([Path("runs/a"), Path("runs/b")]), named([Path("x/a"), Path("y/a")])
    (['a', 'b'], ['x/a', 'y/a'])
    """
    whole = [path.resolve().parts for path in paths]
    for n in range(1, max(map(len, whole)) + 1):
        short = ["/".join(parts[-n:]) for parts in whole]
        if len(set(short)) == len(set(whole)):
            break
    return [plain(name)[:200] for name in short]

"""Where the numbers of a run go: JSON lines, CSV files, TensorBoard's event files, or somebody's own tracker.

A writer has `log(updates, {name: number})` and `close()`; one process writes. Nothing is imported before it is used:
TensorBoard is an optional extra, and trackers of wandb's shape are handed in.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

END = math.inf  # `after=END`: nothing is cut, what follows is appended


class Writer(Protocol):
    """What takes the numbers of a run."""

    def log(self, updates: int, values: Mapping[str, Any], /) -> None:
        """Numbers by name, after so many updates."""

    def close(self) -> None:
        """All that was logged is where it belongs."""


def number(name: str, value: Any) -> Any:
    """A value of a log as a plain bool, int or float.

    Args:
      value: a number, or anything of one number that has `item()`, as a 0-d tensor.

    Raises:
      TypeError: it is no number.

    >>> import torch
    >>> number("loss", torch.tensor(0.5)), number("ok", True), number("rows", 7)
    (0.5, True, 7)
    """
    try:
        plain = value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):
        plain = value
    if not isinstance(plain, (bool, int, float)):
        raise TypeError(
            f"log: {name!r} is a {type(value).__name__}, not one number; write value.mean(), or leave it out"
        )
    return plain


class JsonLines:
    """A line of JSON for every call: {"step": updates, name: number, ...}, flushed at once.

    Law: after `JsonLines(path, after=n)` the file holds what a run holds that logged nothing after update n.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = JsonLines(Path(folder, "metrics.jsonl"))
    ...     first.log(1, {"loss": 0.5})
    ...     first.log(2, {"loss": 0.25})
    ...     again = JsonLines(Path(folder, "metrics.jsonl"), after=1)  # goes on from a checkpoint of update 1
    ...     again.log(2, {"loss": 0.125})
    ...     again.close()
    ...     print(Path(folder, "metrics.jsonl").read_text(), end="")
    {"step": 1, "loss": 0.5}
    {"step": 2, "loss": 0.125}
    """

    def __init__(self, path: str | Path, after: float | None = None) -> None:
        """Opens the file; its folder is made.

        Args:
          after: lines of later updates go, since the run does them again; None: the file begins anew; END: all stay.

        Raises:
          ValueError: a line of the file that stays is no such line.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if after is None or not self.path.exists() else [x for x in records(self.path) if x["step"] <= after]
        _replace(self.path, "".join(json.dumps(x) + "\n" for x in kept))
        self._file = self.path.open("a")

    def log(self, updates: int, values: Mapping[str, Any]) -> None:
        """One line.

        Raises:
          TypeError: a value is no number.
          ValueError: a value is called step, which is the number of updates.
        """
        if "step" in values:
            raise ValueError("log: a value is called 'step', which is where the number of updates stands; rename it")
        line = {"step": updates} | {name: number(name, x) for name, x in values.items()}
        print(json.dumps(line), file=self._file, flush=True)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a JsonLines file; a last line that a killed process left unfinished is passed over.

    Raises:
      ValueError: another line is not of a JsonLines file; its number is in the message.
    """
    whole, _, _ = Path(path).read_text().rpartition("\n")
    found = []
    for i, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}:{i}: this is no line of JsonLines; move the file away, or name another")
        found.append(record)
    return found


class Csv:
    """A folder with a file for every name, of lines `updates,value`: the layout of DeepSpeed's csv_monitor.

    "Train/Samples/lr" goes to Train_Samples_lr.csv under the header `step,lr`. Law: as JsonLines', file by file, for
    the names that are logged again.

    Source: DeepSpeed 0.19.8, monitor/csv_monitor.py; here a header is written once a file, not once a process.
    """

    def __init__(self, folder: str | Path, after: float | None = None) -> None:
        """Makes the folder.

        Args:
          after: as JsonLines'.
        """
        self.folder, self._after = Path(folder), after
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = dict[str, Any]()
        self._names = dict[str, str]()

    def log(self, updates: int, values: Mapping[str, Any]) -> None:
        """One line in the file of every name.

        Raises:
          TypeError: a value is no number.
          ValueError: two names would share a file, or a file there is none of Csv.
        """
        for name, x in values.items():
            plain = number(name, x)
            if name not in self._files:
                self._files[name] = self._opened(name)
            csv.writer(self._files[name]).writerow([updates, plain])
            self._files[name].flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _opened(self, name: str) -> Any:
        stem = name.replace("/", "_").replace(" ", "_")
        if self._names.setdefault(stem, name) != name:
            raise ValueError(f"Csv: {self._names[stem]!r} and {name!r} would both be {stem}.csv; rename one")
        path, head = self.folder / f"{stem}.csv", ["step", name.rpartition("/")[2]]
        if not path.exists() or self._after is None:
            path.write_text(",".join(head) + "\r\n", newline="")
        elif self._after != END:
            rows = list(_kept(path, self._after))
            _replace(path, "".join(f"{row}\r\n" for row in rows))
        return path.open("a", newline="")


def _kept(path: Path, after: float) -> Iterator[str]:
    """The whole lines of a CSV file up to an update, headers among them."""
    whole, _, _ = path.read_text().rpartition("\n")
    for i, line in enumerate(whole.splitlines(), 1):
        step = line.partition(",")[0]
        if not (step == "step" or step.isdigit()):
            raise ValueError(f"{path}:{i}: this is no line of Csv; move the file away, or name another folder")
        if step == "step" or int(step) <= after:
            yield line


class TensorBoard:
    """TensorBoard's event files, written by torch.utils.tensorboard; tensorboard must be installed.

    Law: what TensorBoard shows after `TensorBoard(folder, after=n)` is a run that logged nothing after update n.
    """

    def __init__(self, folder: str | Path, after: float | None = None) -> None:
        """Opens an event file in the folder.

        Args:
          after: what the folder's older files say of later updates is not shown any more; None: nothing of them is;
            END: all of it.

        Raises:
          ModuleNotFoundError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            what = f"it cannot be imported here ({e}); write pip install 'funczero[tensorboard]'"
            raise ModuleNotFoundError(f"TensorBoard: the package tensorboard is missing, or {what}") from None
        purged = None if after == END else 0 if after is None else int(after) + 1
        self._writer: Any = SummaryWriter(log_dir=str(folder), purge_step=purged)

    def log(self, updates: int, values: Mapping[str, Any]) -> None:
        """A scalar for every name.

        Raises:
          TypeError: a value is no number.
        """
        for name, x in values.items():
            self._writer.add_scalar(name, number(name, x), updates)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Tracker:
    """A run of wandb's shape, handed in: `run.log({name: number}, step=updates)`. Who opened it finishes it.

    >>> class Run:
    ...     def log(self, values, step):
    ...         print(step, values)
    >>> Tracker(Run()).log(3, {"loss": 0.5})
    3 {'loss': 0.5}
    """

    def __init__(self, run: Any) -> None:
        """run: what wandb.init() or trackio.init() returned, or the module itself.

        Raises:
          TypeError: it has no log.
        """
        if not callable(getattr(run, "log", None)):
            raise TypeError(
                f"Tracker: a {type(run).__name__} has no log(values, step=); give what wandb.init() returned"
            )
        self.run = run

    def log(self, updates: int, values: Mapping[str, Any]) -> None:
        """One call of the run's log.

        Raises:
          TypeError: a value is no number.
        """
        self.run.log({name: number(name, x) for name, x in values.items()}, step=updates)

    def close(self) -> None:
        """Nothing: the run is its owner's."""


def _replace(path: Path, text: str) -> None:
    """The file holds this text, at once or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, newline="")
    os.replace(part, path)

"""A hundred hostile inputs: none runs code, leaves its folder, takes more than 256 MB or 5 s, and each ends in the
house's own class of errors.

Run: python tests/campaign/hostile.py [--only=config] [--seconds=5] [--megabytes=256]
Expect: a table, every verdict "told"; the exit code is 1 otherwise.

A part is a module `hostile_NAME.py` beside this one with `CASES`, a list of `Case`. Every case runs in a fork of this
process, alone, with an audit hook.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

RUNS = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "pickle.find_class",
    "ctypes.dlopen",
    "code.__new__",
)
WRITES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
)


class Case(NamedTuple):
    """One hostile input."""

    name: str
    attempt: Callable[[Path], Any]  # does with the input what a user would, in an empty folder that is its own
    errors: tuple[type[BaseException], ...]  # one of these is raised, exactly
    harmless: bool = False  # it may also pass: what it would harm is looked at by `attempt` itself


class Result(NamedTuple):
    """What became of it."""

    name: str
    verdict: str  # told, or what went wrong
    said: str
    seconds: float
    megabytes: float


def parts(only: str = "") -> Iterator[tuple[str, list[Case]]]:
    """The modules of cases that are there."""
    for file in sorted(Path(__file__).parent.glob("hostile_*.py")):
        name = file.stem.removeprefix("hostile_")
        if only in ("", name):
            yield name, importlib.import_module(file.stem).CASES


def run(case: Case, seconds: float = 5.0, megabytes: float = 256.0) -> Result:
    """One case in a fork of this process, which has imported what it needs; a folder beside its own must stay as is."""
    above = Path(tempfile.mkdtemp(prefix="hostile-"))
    folder, beside = above / "own", above / "beside"
    for each in (folder, beside):
        each.mkdir()
    (beside / "sentinel").write_text("as it is")
    before, start = _seen(above, folder), time.monotonic()
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(told)
            os.write(tell, json.dumps(_attempt(case, folder)).encode())
        finally:
            os._exit(0)
    os.close(tell)
    found = _read(told, child, start + 4 * seconds)
    took = time.monotonic() - start
    left = _seen(above, folder)
    shutil.rmtree(above, ignore_errors=True)
    if found is None:
        return Result(case.name, f"ended without a word, or was ended after {took:.0f} s", "", took, 0.0)
    wrong = [*found["wrong"]]
    wrong += ["it left its folder"] if left != before else []
    wrong += [f"{found['cpu']:.1f} s"] if found["cpu"] > seconds else []
    wrong += [f"{found['megabytes']:.0f} MB"] if found["megabytes"] > megabytes else []
    return Result(case.name, "; ".join(dict.fromkeys(wrong)) or "told", found["said"], found["cpu"], found["megabytes"])


def _read(pipe: int, child: int, until: float) -> dict[str, Any] | None:
    os.set_blocking(pipe, False)
    data = b""
    while True:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(pipe, 1 << 16):
                data += piece
        if os.waitpid(child, os.WNOHANG)[0]:
            with contextlib.suppress(BlockingIOError):
                data += os.read(pipe, 1 << 20)
            os.close(pipe)
            return json.loads(data) if data else None
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def _attempt(case: Case, folder: Path) -> dict[str, Any]:
    os.chdir(folder)
    limit = 8 << 30  # so that a case that asks for all memory does not take this machine along
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    wrong: list[str] = []
    sys.addaudithook(lambda event, args: wrong.extend(_judged(event, args, folder)))
    rest, start = _rss(), time.process_time()
    said = ""
    try:
        case.attempt(folder)
        wrong += [] if case.harmless else ["it was accepted"]
    except case.errors as error:
        said = str(error)
        wrong += [f"{type(error).__name__} is no error of ours"] if type(error) not in case.errors else []
        wrong += [] if said.isprintable() and len(said) <= 4000 else ["its message is not one short line"]
    except BaseException as error:
        said = "".join(traceback.format_exception(error))[-1500:]
        wrong.append(f"{type(error).__name__} is no error of ours")
    cpu = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wrong": wrong, "said": said, "cpu": cpu, "megabytes": max(0.0, peak - rest)}


def _judged(event: str, args: tuple[Any, ...], folder: Path) -> list[str]:
    """What is wrong about an event of the interpreter: something is started, or written elsewhere."""
    if event in RUNS:
        return [f"it runs {event}"]
    paths: list[Any] = []
    if (
        event == "open"
        and isinstance(args[0], (str, bytes))
        and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        paths = [args[0]]
    elif event in WRITES:
        touched = (
            args[1:2]
            if event == "os.symlink"
            else args[:2] if event in ("os.rename", "os.link", "shutil.move") else args[:1]
        )
        paths = [x for x in touched if isinstance(x, (str, bytes))]
    here = os.path.realpath(folder)
    return [
        f"it writes {os.fsdecode(p)!r}"
        for p in paths
        if not os.path.realpath(os.fsdecode(p)).startswith((here, "/dev/null"))
    ]


def _seen(above: Path, folder: Path) -> list[tuple[str, int, int]]:
    """Everything beside a case's own folder."""
    out = []
    for place, _, files in os.walk(above):
        if not place.startswith(str(folder)):
            out += [
                (os.path.join(place, f), (s := os.lstat(os.path.join(place, f))).st_size, s.st_mtime_ns) for f in files
            ]
    return sorted(out)


def _rss() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> int:
    """Every case of every part; a table."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", default="", help="one part: the NAME of hostile_NAME.py")
    p.add_argument("--seconds", type=float, default=5.0, help="of processor time a case may take")
    p.add_argument("--megabytes", type=float, default=256.0, help="that a case may add to the process")
    p.add_argument("--verbose", action="store_true", help="what every case was told")
    args = p.parse_args()
    bad = total = 0
    for part, cases in parts(args.only):
        results = [run(case, args.seconds, args.megabytes) for case in cases]
        for r in results:
            if r.verdict != "told" or args.verbose:
                print(f"{part}: {r.name}: {r.verdict} ({r.seconds:.2f} s, {r.megabytes:.0f} MB)\n    {r.said[:300]}")
        wrong = sum(r.verdict != "told" for r in results)
        print(
            f"{part:<12} {len(results):>3} inputs, {wrong} not told; slowest {max(r.seconds for r in results):.2f} s,"
            f" largest {max(r.megabytes for r in results):.0f} MB",
            flush=True,
        )
        bad, total = bad + wrong, total + len(results)
    print(f"{'in all':<12} {total:>3} inputs, {bad} not told")
    return 1 if bad or not total else 0


if __name__ == "__main__":
    sys.exit(main())

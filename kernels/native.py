"""The C++ of a kernel: compiled at its first use, kept in a cache, called through ctypes.

A file has a plain C interface and includes nothing of torch, so it compiles in a few seconds, where an extension of
torch's own headers takes most of a minute, and the interpreter's lock is free while it runs. Never -ffast-math: loading
such a library makes the whole process flush subnormal numbers.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from absl import logging
from torch import Tensor

HERE = Path(__file__).parent
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # as in common.h
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden")
LINKS = ("-shared", "-fPIC", "-pthread")
NATIVE = {"x86_64": ("-march=native",), "aarch64": ("-mcpu=native",)}  # whose tuning knows how wide vectors pay
WAITS = 120.0  # seconds for another process that builds the same; then this one builds its own
BUILDS = 300.0  # seconds for the compiler


class Missing(Exception):
    """Why there is no library."""


@lru_cache(maxsize=64)
def library(name: str) -> ctypes.CDLL | None:
    """The library of kernels/<name>/<name>.cpp; None, said once on every machine, where it cannot be built.

    Law: a folder holds complete libraries alone, since each is built beside them and renamed. Several processes build
    one once; one that is killed while it builds holds up nobody.

    Source: FUNCZERO_CACHE, else $XDG_CACHE_HOME/funczero, else ~/.cache/funczero.
    """
    try:
        return _loaded(name)
    except (Missing, OSError, RuntimeError, subprocess.SubprocessError) as e:
        say(name, f"{e}")
        return None


def build(names: tuple[str, ...]) -> None:
    """Compile what is not in the cache yet, all at once: before ranks start that would wait for it in a step."""
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(library, names))


def say(name: str, why: str) -> None:
    """That a kernel runs as its reference, on one process of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logging.warning("kernels: %s runs as its reference in torch, with the same values and slower: %s", name, why)


def _loaded(name: str) -> ctypes.CDLL:
    command, folder = _command(name), _folder()
    path = folder / f"{name}-{_key(name, command)}.so"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut off by a disk that was full, or of another system
            path.unlink(missing_ok=True)
    with _alone(path.with_suffix(".lock")):
        if not path.exists():
            _build(command, path)
    return ctypes.CDLL(str(path))


def _folder() -> Path:
    own, shared = os.environ.get("FUNCZERO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "funczero"


def _command(name: str) -> list[str]:
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Missing("no C++ compiler is found; install g++, or write the path of one in CXX")
    native = NATIVE.get(platform.machine(), ())
    return [compiler, *FLAGS, *native, *LINKS, f"-I{HERE}", str(HERE / name / f"{name}.cpp")]


def _key(name: str, command: list[str]) -> str:
    """Of everything that the library follows from."""
    parts = [torch.__version__, *command[1:-2], command[0], str(os.stat(command[0]).st_mtime_ns), _processor()]
    parts += [(HERE / "common.h").read_text(), (HERE / name / f"{name}.cpp").read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    kept = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
    return "\n".join(x for x in lines if x.split("\t")[0].strip() in kept)


def _build(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        part = Path(made) / path.name
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, timeout=BUILDS)
        if done.returncode or not part.exists():
            lines = done.stderr.strip().splitlines() or ["it says nothing"]
            first = next((x for x in lines if "error" in x), lines[0])
            raise Missing(f"{command[0]} does not compile {path.name.split('-')[0]}.cpp: {first}")
        os.replace(part, path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; a lock of the system, which ends with its holder."""
    with open(path, "w") as file:
        until = time.monotonic() + WAITS
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks: two may build the same, and rename the same
                break
        yield


def plain(*tensors: Tensor) -> bool:
    """May a library read and write these? Not what torch traces, batches or differentiates, nor what is strided."""
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return False
    return all(
        type(x) is Tensor
        and x.is_cpu
        and x.is_contiguous()
        and not x.requires_grad
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        for x in tensors
    )


def written(*tensors: Tensor) -> None:
    """Tells autograd that a library has written into these, so that a graph that saved one refuses to go on."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def integers(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """Numbers as a C array."""
    return (ctypes.c_int64 * len(values))(*values)

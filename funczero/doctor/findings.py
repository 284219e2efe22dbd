"""What is found on this machine, line by line: nothing is changed, and nothing is imported that a run would not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

from funczero.core.version import version_of
from funczero.kernels import registry
from funczero.layout.processes import default_device
from funczero.world import environment

WELL, NOTE, WRONG = "ok", "-", "!!"  # it is used; it is not there, or not used, which may be fine; nothing runs so
OPTIONAL = {
    "tensorboard": "fz.writers.TensorBoard, a config's tensorboard",
    "matplotlib": "loss.png",
    "transformers": "Hugging Face's Trainer under launch --as_deepspeed",
    "accelerate": "the same, and Accelerate itself",
    "lightning": "funczero.lightning, two strategies",
    "peft": "adapters of fz.save_adapters, read elsewhere",
    "triton": "kernels on a GPU",
}
LAUNCHERS = {
    "ssh": "launch over a hostfile",
    "pdsh": "launch --launcher=pdsh",
    "mpirun": "launch --launcher=openmpi and its kin",
    "srun": "launch --launcher=slurm",
}
BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")
SHM = 64 * 2**20  # what containers have unless they are told


class Finding(NamedTuple):
    """One line of the report."""

    room: str
    name: str
    what: str
    use: str  # what of funczero it is for
    mark: str = WELL


def findings() -> Iterator[Finding]:
    """All but the self-test, in the order of the report."""
    yield from packages()
    yield from collectives()
    yield from devices()
    yield from kernels()
    yield from launchers(os.environ)
    yield from memory()


def packages(requires: Iterable[str] | None = None) -> Iterator[Finding]:
    """Python, the packages that are required with their versions, and those that are not.

    Args:
      requires: as the metadata of a package has them; None: funczero's.

    >>> found = packages(["numpy", "nothing-of-that-name", "torch>=99,<100", "peft; extra == 'test'"])
    >>> [(f.name, f.mark) for f in found if f.use == "required"]
    [('python', 'ok'), ('numpy', 'ok'), ('nothing-of-that-name', '!!'), ('torch', '!!')]
    """
    yield Finding("packages", "python", platform.python_version(), "required")
    if requires is None:
        try:
            requires = importlib.metadata.requires("funczero") or []
            yield Finding("packages", "funczero", importlib.metadata.version("funczero"), "itself")
        except importlib.metadata.PackageNotFoundError:
            requires = []
            yield Finding("packages", "funczero", "not installed, runs from its folder", "itself", NOTE)
    for text in requires:
        if "extra ==" not in text:
            yield _required(text)
    for name, use in OPTIONAL.items():
        there = version_of(name)
        yield Finding("packages", name, there or "not installed", use, WELL if there else NOTE)


def _required(text: str) -> Finding:
    name = re.split(r"[^\w.-]", text, maxsplit=1)[0]
    there, bounds = version_of(name), re.findall(r"(>=|<)\s*([\d.]+)", text)
    number = lambda version: [int(x) for x in re.findall(r"\d+", version.partition("+")[0])[:3]]
    if not there:
        return Finding("packages", name, f"not installed; write pip install '{text}'", "required", WRONG)
    fits = all((number(there) >= number(v)) == (sign == ">=") for sign, v in bounds)
    said = there if fits else f"{there}, but {text} is needed; write pip install '{text}'"
    return Finding("packages", name, said, "required", WELL if fits else WRONG)


def collectives() -> Iterator[Finding]:
    """torch's backends that are built in, and the one that a run would take."""
    own = dist.get_default_backend_for_device(default_device().type) if dist.is_available() else ""
    for name in BACKENDS:
        there = dist.is_available() and dist.is_backend_available(name)
        use = "what a run on this machine sends by" if name == own else "not used unless init_distributed names it"
        wrong = name == own and not there or name == "gloo" and not there
        yield Finding(
            "collectives",
            name,
            "built in" if there else "not built in",
            use,
            WRONG if wrong else WELL if there else NOTE,
        )


def devices() -> Iterator[Finding]:
    """Where a run computes: accelerators, cores, threads."""
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    kind = torch.accelerator.current_accelerator() if count else None
    for i in range(count):
        named = getattr(torch, kind.type, None) if kind else None
        name = named.get_device_name(i) if named is not None and hasattr(named, "get_device_name") else ""
        yield Finding("devices", f"{kind.type if kind else ''}:{i}", name or "an accelerator", "one rank each")
    if not count:
        yield Finding("devices", "accelerator", "none", "ranks compute on the CPU", NOTE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("devices", "cores", str(cores), "shared by the ranks of this machine")
    said, threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    what = f"{threads} a process, by {'OMP_NUM_THREADS' if said else 'torch alone'}"
    use = "the same bits need as many threads in every rank"
    yield Finding("devices", "threads", what, use if said else f"{use}: set OMP_NUM_THREADS, as launchers do")


def kernels() -> Iterator[Finding]:
    """Which form of every kernel runs on this machine's device; one that is not built yet is compiled."""
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    use = "kernels on the CPU; without one they run in torch, slower"
    yield Finding("kernels", "C++ compiler", compiler or "none", use, WELL if compiler else NOTE)
    for device in {torch.device("cpu"), torch.device(default_device().type)}:
        for name in registry.NAMES:
            form = registry.used(name, device)
            what = "torch, the reference" if form == "reference" else f"the fast form for a {form}"
            yield Finding("kernels", name, what, f"on {device.type}", NOTE if form == "reference" else WELL)


def launchers(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What could start ranks, and who has started this process.

    >>> [(f.name, f.mark) for f in launchers({"RANK": "0"})][-1]
    ('this process', '!!')
    """
    for name, use in LAUNCHERS.items():
        where = shutil.which(name)
        yield Finding("launchers", name, where or "not found", use, WELL if where else NOTE)
    try:
        found = environment.read(environ)
    except RuntimeError as e:
        yield Finding("launchers", "this process", str(e), "who started it", WRONG)
        return
    who = (
        f"rank {found['RANK']} of {found['WORLD_SIZE']}, by {environment.launcher(environ)}"
        if found
        else "a world of one"
    )
    yield Finding("launchers", "this process", who, "who started it")


def memory() -> Iterator[Finding]:
    """Shared memory, and room for temporary files."""
    for path, use in (("/dev/shm", "loaders with workers, NCCL"), ("/tmp", "worlds for tests, kernels being built")):
        try:
            free = shutil.disk_usage(path).free
        except OSError:
            yield Finding("memory", path, "not there", use, NOTE)
            continue
        small = free <= SHM
        said = f"{free / 2**30:.1f} GiB free" + "; a container gets more by --shm-size" * (small and path == "/dev/shm")
        yield Finding("memory", path, said, use, NOTE if small else WELL)

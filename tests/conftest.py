"""What all tests share: one thread, as in the workers, and one pool of workers per world size."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def hands_out(config: pytest.Config) -> bool:
    """Is this the process that hands files to workers? It runs no test, and need not wait for torch."""
    return getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    """One thread, compiled kernels, and with the slow tests 100 examples where a test does not say how many."""
    if hands_out(config):
        return
    gc.disable()  # until all is collected: nothing of what is imported goes away
    import hypothesis
    import torch

    from funczero.kernels import native, registry

    torch.set_num_threads(1)  # bits of large sums depend on the number of threads
    house = dict(deadline=None, derandomize=True, database=None)
    hypothesis.settings.register_profile("house", **house)
    hypothesis.settings.register_profile("few", max_examples=40, **house)
    hypothesis.settings.load_profile("few" if config.option.markexpr == "not slow" else "house")
    native.build(registry.NAMES)  # before a rank would wait for them; a cache keeps them


# What every worker would import in each of its lives: the server that they are forked from has it, and has no thread.
IMPORTED = (
    "pytest", "hypothesis", "sympy", "torch._dynamo", "orbax.checkpoint", "transformers.modeling_utils",
    "funczero.testing.proven", "funczero.deepspeed", "torch._decomp.decompositions_for_jvp",
)  # fmt: skip

# The longest first. (Without --no-loadscope-reorder xdist would begin with the files that have the most tests.)
LONG = (
    "test_checkpoint_kills.py",
    "test_hf_trainer.py",
    "test_lightning.py",
    "test_docs.py",
    "test_compile.py",
    "test_loops.py",
    "test_exact.py",
    "test_told.py",
    "test_differentiable.py",
    "test_world.py",
    "test_plan.py",
    "test_checkpoint_hostile.py",
    "test_checkpoint_ends.py",
    "test_watch.py",
    "test_config_train.py",
    "test_reference.py",
    "test_readme.py",
    "test_launch_run.py",
    "test_checkpoint_flat.py",
    "test_memory.py",
    "test_examples.py",
    "test_train_gpt.py",
    "test_wheel.py",
    "test_presence.py",
    "test_zeropp.py",
)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Files that take long come first, so that of two workers none waits for the other's last one."""
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: no collection goes through it again."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def launched() -> Iterator[None]:
    """No test leaves a launcher's names in the environment: the next one would believe that it is a rank."""
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    before = {name: os.environ.get(name) for name in names}
    yield
    after = {name: os.environ.get(name) for name in names}
    os.environ.update({k: v for k, v in before.items() if v is not None})
    for name in names:
        if before[name] is None:
            os.environ.pop(name, None)
    assert after == before, "a test changed who its process is among ranks, for all tests after it"


@pytest.fixture(scope="session")
def run_world() -> Iterator[Callable[..., list[Any]]]:
    """`run_world(4, fn, *args, timeout=60)`: a module-level function in every rank of a gloo world of 4; its results by
    rank.
    """
    from funczero.testing import WorkerPool

    pools: dict[int, WorkerPool] = {}

    def run(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        __tracebackhide__ = True
        if size not in pools:
            pools[size] = WorkerPool(size, preload=IMPORTED)
        return pools[size].run(fn, *args, timeout=timeout)

    yield run
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def ends():
    """`ends.run(folder, script, size)`: scripts run to their very end, as tests/ends.py says."""
    from ends import Ends

    e = Ends()
    yield e
    e.close()


@pytest.fixture(scope="session")
def originals(run_world, tmp_path_factory):
    """The checkpoints that tests damage copies of, as `damage.written_both` says."""
    import damage

    return damage.written_both(run_world, tmp_path_factory)


@pytest.fixture
def alone(monkeypatch):
    """A process that torchrun has not started and that has joined nothing."""
    import torch

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


@pytest.fixture
def text(tmp_path):
    """A folder of three files of some text."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("".join(f"{n} times {i} is {n * i}\n" for n in range(100)))
    return tmp_path


@pytest.fixture
def gpt(monkeypatch):
    """The model of the experiments."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "experiments")
    import gpt

    return gpt

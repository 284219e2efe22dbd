"""Kernels: every form against its reference on hard values, and what happens where none can be built."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from funczero.kernels import native, registry
from funczero.kernels.adamw import reference as adamw
from funczero.kernels.adamw import trial as updates
from funczero.kernels.block_quantise import trial as blocks
from funczero.kernels.crc32c import trial as crc32c
from funczero.kernels.grid import trial as grid
from funczero.kernels.hadamard import trial as hadamard
from funczero.kernels.same import hard, same
from funczero.kernels.squares import trial as squares

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NATIVE = pytest.mark.skipif(native.library("hadamard") is None, reason="no C++ compiler is here")


def returned(module, name, args):
    out = getattr(module, name)(*args)
    return out if isinstance(out, tuple) else (out,)


TABLE = {
    "block_quantise": (lambda: blocks.cases(CPU, DTYPES, blocks.MORE), returned),
    "crc32c": (lambda: crc32c.cases(CPU), crc32c.called),
    "hadamard": (lambda: hadamard.cases(CPU), returned),
    "grid": (lambda: grid.cases(CPU), grid.called),
    "squares": (lambda: squares.cases(CPU, DTYPES, ((70_001, 1 << 18), (1 << 18, 1, 300_000))), squares.called),
    "adamw": (lambda: ((w, "", case) for w, case in updates.cases(CPU, DTYPES)), lambda m, _, c: updates.called(m, c)),
}


def differing(name, form, table=TABLE):
    """The cases of a kernel in which a form has other bits than the reference."""
    fast, truth = (registry._module(name, x) for x in (form, "reference"))
    cases, call = table[name]
    return [
        words
        for words, fn, args in cases()
        if not all(same(x, y) for x, y in zip(call(fast, fn, args), call(truth, fn, args), strict=True))
    ]


@NATIVE
@pytest.mark.parametrize("name", registry.NAMES)
def test_a_form_in_cpp_has_the_references_bits(name):
    assert differing(name, "cpu") == []
    assert registry.used(name, CPU) == "cpu"


@NATIVE
def test_large_buffers_are_cut_into_threads_anywhere_with_the_same_bits():
    n, lengths = 300_001, (131_071, 1, 168_929)
    x, before = hard(n, torch.float32), torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            out = [*returned(registry.kernel("hadamard", CPU), "hadamard", (x, (n - 1, 1), 16))]
            for form in ("int8", "int4"):
                coded = registry.kernel("block_quantise", CPU).quantise(x, lengths, 33, form)
                out += [*coded, registry.kernel("block_quantise", CPU).dequantise(*coded, lengths, 33, form)]
            low, bounds, shifts = torch.zeros(n, dtype=torch.int64), ((0, 150_000), (150_000, n)), torch.tensor([9, 30])
            out += [registry.kernel("grid", CPU).to_grid_add(x, bounds, shifts, low), low]
            out += [registry.kernel("grid", CPU).from_grid(low, None, bounds, shifts, torch.float32)]
            out += [registry.kernel("squares", CPU).square_bins([x.nan_to_num(0, 1, 1), x, low[:9].float()])]
            trees = [[hard(n, torch.float32, k)] for k in range(3)] + [[hard(n, torch.float32, 3).abs()]]
            case = (trees, torch.tensor(3.0), torch.tensor(0.7), torch.tensor(0.0), updates.RATES[0])
            out += updates.called(registry.kernel("adamw", CPU), case)
        finally:
            torch.set_num_threads(before)
        results.append(out)
    assert all(same(x, y) for x, y in zip(*results, strict=True))


@NATIVE
def test_what_is_written_in_place_is_refused_by_a_graph_that_saved_it():
    x = torch.rand(32)
    y = (x * torch.ones(32, requires_grad=True)).sum()
    case = ([[x], [torch.ones(32)], [torch.zeros(32)], [torch.zeros(32)]], torch.tensor(1.0), torch.tensor(1.0))
    registry.kernel("adamw", CPU).update(*case[0], *case[1:], torch.tensor(0.0), updates.RATES[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@NATIVE
def test_sizes_that_do_not_fit_never_reach_the_library():
    fast, x = registry._module("block_quantise", "cpu"), torch.rand(40)
    codes, tops = fast.quantise(x, (40,), 16, "int8")
    for call in (
        lambda: fast.quantise(x, (41,), 16, "int8"),
        lambda: fast.quantise(x, (40,), 16, "int8", None, torch.empty(39, dtype=torch.uint8)),
        lambda: fast.dequantise(codes[:39], tops, (40,), 16, "int8"),
        lambda: fast.dequantise(codes, tops[:2], (40,), 16, "int8"),
        lambda: fast.requantise(codes, tops, x[:39], (40,), 16, "int8"),
        lambda: registry._module("hadamard", "cpu").hadamard(x, (41,), 8),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("form", [pytest.param("cpu", marks=NATIVE), "reference"])
def test_what_a_checksum_is_written_behind_is_there_or_told(tmp_path, form):
    module, x = registry._module("crc32c", form), torch.arange(2 * (128 << 10) + 5).to(torch.uint8)
    with (tmp_path / "file").open("w+b") as file:
        crc = module.write(file.fileno(), 3, x)
        assert file.read() == bytes(3) + x.numpy().tobytes() + module.crc32c(x).to_bytes(4, "little")
    assert crc == module.crc32c(x)
    with open("/dev/full", "wb") as file, pytest.raises(OSError, match="No space left on device"):
        module.write(file.fileno(), 0, x[:9])


@NATIVE
def test_draws_are_the_references():
    fast, truth = (registry._module("block_quantise", x) for x in ("cpu", "reference"))
    for dtype in DTYPES:
        x = hard(150, dtype)
        for form in ("int8", "int4"):
            one, other = (
                returned(m, "quantise", (x, (37, 113), 16, form, torch.Generator().manual_seed(5)))
                for m in (fast, truth)
            )
            assert all(same(a, b) for a, b in zip(one, other, strict=True))


@NATIVE
@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_an_update_does_not_depend_on_where_leaves_are_cut_and_a_skipped_one_reads_nothing(form):
    module = registry._module("adamw", form)
    trees = [[hard(301, torch.float32, k)] for k in range(3)] + [[hard(301, torch.float32, 3).abs()]]
    numbers = (torch.tensor(3.0), torch.tensor(0.7), torch.tensor(0.0), updates.RATES[0])
    whole = updates.called(module, (trees, *numbers))
    for cut in (1, 7, 16, 150):
        parts = [[x for t in tree for x in (t[:cut], t[cut:])] for tree in trees]
        found = updates.called(module, (parts, *numbers))
        assert all(same(torch.cat(found[2 * i : 2 * i + 2]), x) for i, x in enumerate(whole))
    skipped = updates.called(module, (trees, *numbers[:2], torch.tensor(1.0), updates.RATES[0]))
    assert all(same(x, t[0]) for x, t in zip(skipped, (trees[0], *trees[2:]), strict=True))


@NATIVE
def test_subnormal_numbers_live_after_all_libraries_are_loaded():
    assert all(native.library(name) is not None for name in registry.NAMES)
    x = torch.full((64,), 1e-41)
    assert bool((x * 1.0 > 0).all()) and bool((x + x > x).all())


class Seen(TorchDispatchMode):
    """What a tracer sees."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@NATIVE
def test_what_is_traced_batched_or_strided_goes_the_references_way():
    fast, x = registry._module("hadamard", "cpu"), hard(64, torch.float32)
    want = fast.hadamard(x, (64,), 8)
    assert same(torch.func.vmap(lambda y: fast.hadamard(y, (64,), 8))(torch.stack([x, x]))[1], want)
    assert same(fast.hadamard(torch.stack([x, x], 1)[:, 0], (64,), 8), want)
    with Seen() as seen:
        assert same(fast.hadamard(x, (64,), 8), want)
    assert "aten.sub.Tensor" in seen.names
    leaf = torch.ones(64, requires_grad=True)
    assert fast.hadamard(leaf, (64,), 8).requires_grad


@pytest.mark.parametrize("name", [*(f"{name}.reference" for name in registry.NAMES), "registry"])
def test_examples_run(name):
    module = importlib.import_module(f"funczero.kernels.{name}")
    tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried.attempted and not tried.failed


def test_a_word_that_does_not_exist_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="kernel: 'fft' does not exist; write one of"):
        registry.kernel("fft", CPU)
    monkeypatch.setenv("FUNCZERO_KERNELS", "fastest")
    with pytest.raises(ValueError, match="FUNCZERO_KERNELS='fastest' does not exist; write one of"):
        registry.kernel("grid", CPU)
    monkeypatch.setenv("FUNCZERO_KERNELS", "reference")
    assert {registry.used(name, CPU) for name in registry.NAMES} == {"reference"}


def test_a_form_with_other_bits_is_told_and_not_used(monkeypatch, caplog):
    monkeypatch.setattr(updates, "differs", lambda fast, device: "the third case")
    monkeypatch.setattr(registry, "_there", lambda name, device: adamw)
    assert registry._proved.__wrapped__("adamw", CPU, False) is adamw
    assert "adamw runs as its reference" in caplog.text and "other bits on cpu: the third case" in caplog.text


# --- in processes of their own ----------------------------------------------------------------------------------------
def script(code, *, at_once=1, **env):
    """What fresh processes print, as JSON, and what they say."""
    code = f"import json, torch\nfrom funczero.kernels import native, registry\n{code}"
    paths = os.pathsep.join(x for x in sys.path if x)
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}},
        )
        for _ in range(at_once)
    ]
    ended = [p.communicate(timeout=240) for p in started]
    assert all(p.returncode == 0 for p in started), ended
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in ended], [err for _, err in ended]


USED = "print(json.dumps([registry.used('hadamard', torch.device('cpu')) for _ in range(2)]))"


@NATIVE
@pytest.mark.slow
def test_two_processes_build_one_library_and_a_dead_builder_holds_up_nobody(tmp_path, monkeypatch):
    (tmp_path / "tmpdead").mkdir()  # what a builder leaves that was killed
    (tmp_path / "tmpdead" / "hadamard.so").write_bytes(b"half")
    name = Path(native.library("hadamard")._name).name
    (tmp_path / name.replace(".so", ".lock")).touch()
    found, said = script(USED, at_once=2, FUNCZERO_CACHE=tmp_path)
    assert found == [["cpu", "cpu"]] * 2 and not any("reference" in x for x in said)
    assert [x.name for x in tmp_path.glob("*.so")] == [name]
    (tmp_path / name).write_bytes(b"cut off")
    monkeypatch.setenv("FUNCZERO_CACHE", str(tmp_path))
    assert native.library.__wrapped__("hadamard") is not None
    assert (tmp_path / name).stat().st_size > 1000


NONE = {
    "no C++ compiler is found; install g++, or write the path of one in CXX": dict(CXX="", PATH="/nowhere"),
    "false does not compile hadamard.cpp: it says nothing": dict(CXX="false"),
    "No such file or directory: '/proc/nothing": dict(FUNCZERO_CACHE="/proc/nothing"),
}


@pytest.mark.parametrize("why", NONE, ids=["no compiler", "one that fails", "no cache"])
def test_without_a_library_the_reference_runs_and_says_so_once_on_a_machine(why, tmp_path, monkeypatch, caplog):
    for name, value in {"FUNCZERO_CACHE": str(tmp_path), **NONE[why]}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "library", lru_cache(native.library.__wrapped__))
    for _ in range(2):
        assert registry._proved.__wrapped__("hadamard", CPU, False).__name__.endswith("reference")
    assert caplog.text.count("hadamard runs as its reference in torch, with the same values and slower: ") == 1
    assert why in caplog.text
    caplog.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert native.library.__wrapped__("hadamard") is None and not caplog.text


INTERPRETED = """
import test_kernels as t, triton_targets
few = {**t.TABLE, "block_quantise": (lambda: t.blocks.cases(t.CPU, t.DTYPES), t.returned)}
bad = {name: t.differing(name, "gpu", few) for name in ("block_quantise", "hadamard", "grid")}
print(json.dumps([bad, triton_targets.beyond()]))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_in_its_interpreter_has_the_references_bits_and_adamw_its_bound():
    (bad,), _ = script(INTERPRETED, TRITON_INTERPRET=1)
    assert bad == [{"block_quantise": [], "hadamard": [], "grid": []}, []]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_compiles_every_kernel_for_cuda_and_rocm_without_a_gpu(tmp_path):
    code = "import triton_targets as t\nprint(json.dumps(t.compiled()))"
    (made,), _ = script(code, TRITON_CACHE_DIR=tmp_path)
    assert len(made) > 60 and min(made.values()) > 500

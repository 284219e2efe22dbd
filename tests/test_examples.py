"""Examples are pages; those with a loop of their own have one result on one and on two processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_fits_on_a_page(name):
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 120
    assert all(f"\n{word}:" in (FOLDER / f"{name}.py").read_text() for word in ("Shows", "Run", "Expect", "Found"))
    assert f"[`{name}.py`]({name}.py)" in (FOLDER / "README.md").read_text()


def ran(name, **sizes):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(updates=2, **sizes)


def two_updates(name, accumulate):
    return ran(name, accumulate=accumulate, **({"games": 8} if name == "actor_critic" else {"rows": 8}))


@pytest.mark.parametrize("name", ["actor_critic", "dcgan", "lora"])
def test_a_loop_of_its_own_has_one_result(run_world, name):
    (one,), two = run_world(1, two_updates, name, 2), run_world(2, two_updates, name, 1)
    assert two[0] == two[1] == one

"""Examples are pages; those with a loop of their own have one result on one and on two processes."""

from __future__ import annotations

import importlib.util
import os
import re
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


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(name, **sizes):
    return loaded(name).main(updates=2, **sizes)


def two_updates(name, accumulate):
    return ran(name, accumulate=accumulate, **({"games": 8} if name == "actor_critic" else {"rows": 8}))


@pytest.mark.parametrize("name", ["actor_critic", "dcgan", "dpo", "lora"])
def test_a_loop_of_its_own_has_one_result(run_world, name):
    (one,), two = run_world(1, two_updates, name, 2), run_world(2, two_updates, name, 1)
    if name == "dpo":  # which shows an evaluation
        one = tuple(pytest.approx(x, rel=1e-6) for x in one)
    assert two[0] == two[1] == one


def of_a_script(name, out, accumulate, stage):
    """Losses and the last evaluation of two updates, as its log has them."""
    from absl import flags

    from funczero.script.experiment import planned
    from funczero.script.flags import define
    from funczero.script.loop import train
    from funczero.script.run import Run
    from funczero.writers import records

    module, values = loaded(name), flags.FlagValues()
    defaults = dict(re.findall(r"(\w+)=(\d+)", (FOLDER / f"{name}.py").read_text().rpartition("fz.experiment(")[2]))
    define(name, "rows", {n: int(x) for n, x in defaults.items()} | {"steps": 2, "batch": 8}, values)
    values([name, f"--out={out}", f"--nproc={os.environ.get('WORLD_SIZE', '1')}", f"--stage={stage}",
            f"--accumulate={accumulate}"])  # fmt: skip
    run = Run(name, "rows", values)
    train(run, planned(module.begin, run))
    timed = ("_per_second", "bytes_sent")
    return [{n: x for n, x in r.items() if not n.endswith(timed)} for r in records(Path(out, "metrics.jsonl"))]


@pytest.mark.parametrize("name", [n for n in NAMES if "fz.experiment(" in (FOLDER / f"{n}.py").read_text()])
def test_a_script_has_one_result(run_world, tmp_path, name):
    """Losses have the same bits; evaluations, whose rows are added in one sum a rank, are near."""
    micros = 1 if name == "contrastive" else 2  # its pairs are told from all others of a micro-batch
    (one,) = run_world(1, of_a_script, name, tmp_path / "one", micros, 0)
    two = run_world(2, of_a_script, name, tmp_path / "two", 1, 3)
    near = lambda r: {n: x if n == "loss" and micros == 2 else pytest.approx(x, rel=1e-6) for n, x in r.items()}
    assert two[0] == [near(r) for r in one] and sum("loss" in r for r in one) == 2  # rank 0 writes

"""Recorded environments of launchers, read as torchrun would have written them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from funczero.world import environment

CASES = json.loads((Path(__file__).parent / "golden" / "environments.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_environments(case):
    if "error" in case:
        with pytest.raises(RuntimeError) as caught:
            environment.read(case["environment"])
        assert case["error"] in str(caught.value)
    else:
        assert environment.read(case["environment"]) == case["world"]


@pytest.mark.parametrize("case", [case for case in CASES if case.get("world")], ids=lambda case: case["name"])
def test_what_was_found_is_written_down_and_read_again(case):
    names = dict(case["environment"])
    found = environment.adopt(names)
    assert names.items() >= found.items() and environment.read(names) == found


def test_nobody_described_a_world():
    names = {"PATH": "/bin"}
    assert environment.adopt(names) is None and names == {"PATH": "/bin"}


@pytest.mark.slow
def test_mpi4py_is_never_needed():
    """Two ranks that say only what OpenMPI says find each other."""
    code = (
        "import funczero as fz, torch.distributed as dist, torch; w = fz.init_distributed(); x = torch.ones(1);"
        " dist.all_reduce(x); print(w.rank, int(x))"
    )
    base = {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "MASTER_PORT": "29517",
        "PYTHONPATH": ":".join(p for p in sys.path if p),
        "PATH": "/usr/bin:/bin",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=base | {"OMPI_COMM_WORLD_RANK": str(r), "OMPI_COMM_WORLD_LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in (0, 1)
    ]
    assert [p.communicate(timeout=60)[0] for p in ranks] == ["0 2\n", "1 2\n"]

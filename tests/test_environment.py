"""Recorded environments of launchers, read as torchrun would have written them."""

from __future__ import annotations

import json
import socket
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
        " dist.all_reduce(x); dist.destroy_process_group(); print(w.rank, int(x))"  # gloo's thread lets go of x
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


@pytest.mark.slow
def test_kubernetes_variables_start_a_step_as_torchrun_does():
    """A PyTorchJob's pods: one process each, which the operator describes; and what it writes for torchrun."""
    code = (
        "import torch, funczero.deepspeed as deepspeed; from torch import nn; torch.manual_seed(0);"
        " c = {'train_batch_size': 4, 'optimizer': {'type': 'SGD', 'params': {'lr': 1.0}}, 'gradient_clipping': 0};"
        " e, *_ = deepspeed.initialize(model=nn.Linear(2, 1), config=c); r = deepspeed.comm.get_rank();"
        " e.backward(e(torch.full((2, 2), float(r))).mean()); start = e.module.weight.clone(); e.step();"
        " print(r, e.world_size, e.local_rank, (start - e.module.weight).round(decimals=4).tolist())"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pod = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "PET_NNODES": "2"}
    pod |= {"PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": "localhost", "PYTHONUNBUFFERED": "1"}
    base = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    start = lambda r: subprocess.Popen(
        [sys.executable, "-c", code], env=base | pod | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True
    )
    pods = [start(r) for r in (0, 1)]
    said = [pod.communicate(timeout=400)[0].strip() for pod in pods]
    assert said == ["0 2 0 [[0.5, 0.5]]", "1 2 0 [[0.5, 0.5]]"]


@pytest.mark.parametrize("names", [{"PET_NNODES": "2"}, {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "8"}])
def test_what_is_written_for_a_torchrun_that_nobody_started_is_no_world_of_one(names):
    ((name, value),) = [(n, x) for n, x in names.items() if x != "1"]
    with pytest.raises(RuntimeError, match=f"holds {name}={value}, .* start the script with torchrun, or unset {name}"):
        environment.read(names)
    assert environment.read({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"}) is None
    assert environment.read({**names, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"})

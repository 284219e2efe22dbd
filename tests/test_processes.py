"""This process among all: what a launcher's environment says before the world is joined, and what it is then."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from layouts import TORCHRUN

import funczero as fz
from funczero.layout.mesh import plan_mesh
from funczero.layout.processes import World, default_device, init_distributed, world_rank, world_size
from funczero.testing import simulate


def test_without_torchrun_the_world_is_one(alone):
    assert fz.init_distributed() == World(0, 1, 0) == fz.init_distributed() and world_size() == 1


def test_the_world_size_is_known_before_it_is_joined(alone, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert world_size() == 8 and plan_mesh({"node": 2, "local": -1}).sizes() == {"node": 2, "local": 4}


def test_torchruns_environment_is_joined_once():
    """In a process of its own: a world of one that torchrun describes."""
    code = (
        "import os, funczero as fz, torch.distributed as dist\nfrom funczero.layout.mesh import connect,"
        " plan_mesh\nprint(fz.init_distributed(), dist.is_initialized(), fz.init_distributed(),"
        " connect(plan_mesh({'data': -1})).sizes(), fz.make_mesh({'data': -1}))"
    )
    env = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=env | {"PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
    world = "World(rank=0, size=1, local_rank=0)"
    assert done.stdout.startswith(f"{world} True {world} {{'data': 1}} DeviceMesh"), done.stderr


OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}
ALL = {"torchrun": TORCHRUN, "OpenMPI": OPENMPI, "SLURM": SLURM, "MPICH": MPICH}


@pytest.mark.parametrize("name", ALL)
def test_every_launcher_says_a_rank_before_the_world_is_joined(alone, monkeypatch, name):
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for key, value in {**where, **ALL[name]}.items():
        monkeypatch.setenv(key, value)
    assert (world_rank(), world_size()) == (3, 8)


def test_without_a_launcher_this_is_the_first_of_one(alone):
    assert (world_rank(), world_size()) == (0, 1)
    if not torch.accelerator.is_available():
        assert default_device() == torch.device("cpu")


def test_a_world_that_is_joined_counts_and_not_what_the_environment_says(monkeypatch):
    """Ranks of a simulated world, in an environment of eight processes."""
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    found = simulate({"data": 3})(lambda: (dist.get_rank(), world_rank(), world_size(), init_distributed()))
    assert found == [(r, r, 3, World(r, 3, int(TORCHRUN["LOCAL_RANK"]))) for r in range(3)]

"""Ray Train's TorchTrainer starts a step as torchrun does: a local Ray, two workers.

Skipped without Ray, which no extra brings: `pip install "ray[train]"`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[1])
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # of a busy machine


def loop(settings):
    """One update of each worker's own rows; what it took away goes into a file."""
    import torch
    from torch import nn

    import funczero.deepspeed as deepspeed

    torch.manual_seed(0)
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": 0}
    c = {"train_batch_size": 4, "zero_optimization": {"stage": settings["stage"]}, **sgd}
    engine, *_ = deepspeed.initialize(model=nn.Linear(2, 1), config=c)
    rank, start = deepspeed.comm.get_rank(), engine.module.state_dict()["weight"].clone()
    engine.backward(engine(torch.full((2, 2), float(rank))).mean())
    engine.step()
    moved = (start - engine.module.state_dict()["weight"]).round(decimals=4).tolist()
    Path(settings["folder"], f"stage{settings['stage']}-rank{rank}").write_text(repr((engine.world_size, moved)))


@pytest.mark.slow
def test_torch_trainer_starts_a_step(tmp_path):
    ray = pytest.importorskip("ray")
    train = pytest.importorskip("ray.train.torch")
    from ray.train import RunConfig, ScalingConfig

    path = os.pathsep.join([ROOT, str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        num_cpus=3, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    )
    try:
        for stage in (1, 3):
            train.TorchTrainer(
                loop,
                train_loop_config={"stage": stage, "folder": str(tmp_path)},
                scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
                run_config=RunConfig(storage_path=str(tmp_path / "ray"), name=f"stage{stage}"),
            ).fit()
            told = [(tmp_path / f"stage{stage}-rank{r}").read_text() for r in (0, 1)]
            assert told == ["(2, [[0.5, 0.5]])"] * 2
    finally:
        ray.shutdown()

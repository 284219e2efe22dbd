"""The DeepSpeed checkpoints beside this file, written by DeepSpeed 0.19.8 on two gloo ranks.

Run (one process a rank, RANK and LOCAL_RANK 0 and 1, WORLD_SIZE 2, MASTER_ADDR and MASTER_PORT set, DeepSpeed on
PYTHONPATH): python write.py OUT STAGE [bf16], for stages 1, 2 and 3, and 1 and 3 in bf16. whole.json holds what its
safe_get_full_* answered; at stages 1 and 2 they raise on a rank that holds nothing of a parameter.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn


class Model(nn.Module):
    """Odd sizes, a tied leaf, a frozen one, one that nobody uses, and two buffers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Parameter(torch.arange(4.0) / 8, requires_grad=False)
        self.unused = nn.Parameter(torch.full((3,), 0.5))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor([3, 1], dtype=torch.int64))
        self.register_buffer("mean", torch.tensor([0.25, -1.5]))

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x + self.second(torch.tanh(self.first(x)) * self.frozen[:3]))
        return self.head(x).log_softmax(-1).pow(2).mean()


def main(out, stage, kind=""):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed("gloo")
    rank, stage = int(os.environ["RANK"]), int(stage)
    model = Model()
    decayed = [p for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1]
    others = [p for n, p in model.named_parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    if kind == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1), config=config
    )
    for t in range(3):
        ids = torch.randint(0, 7, (2, 4), generator=torch.Generator().manual_seed(10 * t + rank))
        engine.backward(engine(ids))
        engine.step()
    folder = Path(out) / f"stage{stage}{kind}"
    engine.save_checkpoint(str(folder), tag="three", client_state={"epoch": 2, "note": "ours"})
    torch.distributed.barrier()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            whole[name] = safe_get_full_fp32_param(p).tolist()
            for kind_of in ("exp_avg", "exp_avg_sq"):
                try:  # of stages 1 and 2 a rank raises where it holds nothing of a parameter
                    x = safe_get_full_optimizer_state(p, kind_of)
                except ValueError:
                    x = None
                whole[f"{name}/{kind_of}"] = None if x is None else x.tolist()
    if rank == 0:
        (folder / "whole.json").write_text(json.dumps(whole))
        for script in folder.glob("*.py"):
            script.unlink()
    torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Blocks whose activations are computed again in the backward, at stage 2."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.0)) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


torch.manual_seed(0)
config = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "gradient_clipping": 0.1,
    "zero_optimization": {"stage": 2, "overlap_comm": False},
}
engine, _, _, _ = deepspeed.initialize(model=Net(), config=config)
losses = []
for _ in range(12):
    x = torch.randn(4, 8)
    loss = F.cross_entropy(engine(x), x[:, :3].argmax(1))
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
losses.append(float(engine.get_global_grad_norm()))

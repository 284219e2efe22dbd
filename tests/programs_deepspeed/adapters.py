"""Low-rank adapters on a frozen network, only they in the optimizer, at stage 2."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn


class Adapted(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


torch.manual_seed(0)
net = nn.Sequential(Adapted(nn.Linear(8, 16)), nn.Tanh(), Adapted(nn.Linear(16, 4)))
trained = [p for p in net.parameters() if p.requires_grad]
config = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}
engine, _, _, _ = deepspeed.initialize(model=net, model_parameters=trained, config=config)
before = net[0].base.weight.clone()
losses = []
for _ in range(8):
    x = torch.randn(8, 8)
    loss = F.mse_loss(engine(x), x[:, :4].sin())
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
assert torch.equal(before, net[0].base.weight)

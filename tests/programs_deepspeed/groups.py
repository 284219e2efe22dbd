"""Weights with decay and biases without it, one cycle of the rate, at stage 0."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.SiLU(), nn.Linear(12, 3))
decays = [p for p in net.parameters() if p.dim() > 1]
others = [p for p in net.parameters() if p.dim() < 2]
groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=0.01)
cycle = {
    "cycle_min_lr": 0.001,
    "cycle_max_lr": 0.02,
    "cycle_first_step_size": 4,
    "decay_step_size": 4,
    "decay_lr_rate": 0.5,
}
config = {"train_batch_size": 8, "scheduler": {"type": "OneCycle", "params": cycle}}
engine, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
losses = []
for _ in range(10):
    x = torch.randn(8, 6)
    loss = F.cross_entropy(engine(x), x[:, :3].argmax(1))
    engine.backward(loss)
    engine.step()
    losses += [loss.item(), engine.get_lr()[1], optimizer.param_groups[0]["betas"][0]]

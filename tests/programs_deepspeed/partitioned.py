"""Built inside zero.Init, with a bias written through GatheredParameters, at stage 3."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

config = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.last = nn.Linear(12, 2)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x)


torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path=config):
    net = Net()
with deepspeed.zero.GatheredParameters(net.last.bias, modifier_rank=0):
    if deepspeed.comm.get_rank() == 0:
        nn.init.constant_(net.last.bias, 0.5)
engine, _, _, _ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
losses = []
for step in range(6):
    torch.manual_seed(100 + step)
    x = torch.randn(8, 6)
    loss = F.mse_loss(engine(x), x[:, :2].square())
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
with deepspeed.zero.GatheredParameters([net.last.bias, net.first.weight]):
    losses += [net.last.bias.sum().item(), net.first.weight.norm().item()]

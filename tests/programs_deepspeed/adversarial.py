"""A generator and a discriminator, each with an engine of its own, at stage 1."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
config = {
    "train_batch_size": 16,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.005, "betas": [0.5, 0.999], "torch_adam": True, "adam_w_mode": False},
    },
    "zero_optimization": {"stage": 1},
}
mlp = lambda i, o: nn.Sequential(nn.Linear(i, 24), nn.LeakyReLU(0.2), nn.Linear(24, o))
maker, _, _, _ = deepspeed.initialize(model=mlp(4, 2), config=config)
judge, _, _, _ = deepspeed.initialize(model=mlp(2, 1), config=config)
losses = []
for _ in range(6):
    real = torch.randn(16, 2) * 0.3 + 1
    ones, zeros = torch.ones(16, 1), torch.zeros(16, 1)
    fake = maker(torch.randn(16, 4))
    of_judge = F.binary_cross_entropy_with_logits(judge(real), ones)
    of_judge = of_judge + F.binary_cross_entropy_with_logits(judge(fake.detach()), zeros)
    judge.backward(of_judge)
    judge.step()
    of_maker = F.binary_cross_entropy_with_logits(judge(maker(torch.randn(16, 4))), ones)
    maker.backward(of_maker)
    maker.step()
    losses += [of_judge.item(), of_maker.item()]

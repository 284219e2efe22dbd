"""An LSTM over characters, a schedule that a function makes, clipping and its norm, at stage 2."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(16, 12), nn.LSTM(12, 12, batch_first=True), nn.Linear(12, 16)

    def forward(self, ids):
        return self.head(self.cell(self.table(ids))[0])


torch.manual_seed(0)
config = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
    "gradient_clipping": 0.3,
    "zero_optimization": {"stage": 2},
}
decay = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
net = Net()
engine, _, _, _ = deepspeed.initialize(model=net, model_parameters=net.parameters(), lr_scheduler=decay, config=config)
losses = []
for _ in range(6):
    ids = torch.randint(16, (4, 12))
    loss = F.cross_entropy(engine(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    losses += [loss.item(), float(engine.get_global_grad_norm()), engine.get_lr()[0]]

"""Two forwards in one loss, and an evaluation after every second update, at stage 1."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.0), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
config = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "gradient_clipping": 0}
engine, _, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
fixed = torch.randn(16, 6)
losses = []
for step in range(8):
    engine.train()
    x = torch.randn(8, 6)
    a, b = engine(x), engine(x + 0.1 * torch.randn(8, 6))
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    loss = F.cross_entropy(scores / 0.5, torch.arange(8))
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    if step % 2:
        engine.eval()
        with torch.no_grad():
            losses.append(engine(fixed).var().item())

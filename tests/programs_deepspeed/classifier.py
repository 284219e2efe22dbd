"""An image classifier with the client's SGD and a cosine schedule, at stage 1."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 4, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(4 * 4 * 4, 16),
    nn.ReLU(),
    nn.Linear(16, 3),
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
config = {
    "train_batch_size": 8,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}
engine, _, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, lr_scheduler=schedule, config=config)
losses, lrs = [], []
for _ in range(8):
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
    loss = F.cross_entropy(engine(images), labels)
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    lrs.append(engine.get_lr()[0])
losses += lrs

"""A language model over four micro-batches an update, AdamW and a warmup from the config, at stage 2."""

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32))
config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 2, "total_num_steps": 6, "warmup_max_lr": 0.01},
    },
    "zero_optimization": {"stage": 2},
}
engine, _, _, schedule = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
losses = []
for _ in range(20):
    ids = torch.randint(32, (4, 9))
    logits = engine(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    engine.backward(loss)
    if engine.is_gradient_accumulation_boundary():
        losses.append(loss.item())
    engine.step()
losses += [schedule.get_last_lr()[0], engine.global_steps, engine.micro_steps]

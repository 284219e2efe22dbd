"""Saved after five updates with a client state, and gone on with in another engine, at stage 1."""

import tempfile

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

config = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": 0.02}},
    "zero_optimization": {"stage": 1},
}


def start(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 2))
    return deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]


def train(engine, first, last):
    for step in range(first, last):
        torch.manual_seed(100 + step)
        x = torch.randn(4, 5)
        loss = F.mse_loss(engine(x), x[:, :2].abs())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())


losses = []
folder = tempfile.mkdtemp()
engine = start(0)
train(engine, 0, 5)
engine.save_checkpoint(folder, client_state={"step": 5, "best": min(losses)})
engine = start(1)
path, client = engine.load_checkpoint(folder)
assert path is not None
train(engine, client["step"], 10)
losses += [client["best"], engine.global_steps, engine.get_lr()[0]]

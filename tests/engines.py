"""Engines for tests: a module, configs, batches, and the gradient that an update took away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import funczero.deepspeed as deepspeed

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}}
WARM = {
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2, "warmup_min_lr": 1e-3}}
}
PRECISIONS = {
    "fp32": {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}},
    "bf16": {"bf16": {"enabled": True}},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.b(torch.tanh(self.a(x))))


class Net(nn.Module):
    def __init__(self, blocks=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(()))
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for b in self.blocks:
            x = b(x)
        return self.last(x) * self.scale


def config(stage=0, k=1, precision="fp32", micro=4, **more):
    zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10}}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": k,
        **zero,
        **PRECISIONS[precision],
        **({} if "optimizer" in more else ADAM),
        **more,
    }


def rows(n, updates, k, dtype, bad=()):
    """Micro-batches of every update for this rank: of one global batch, dealt by hand."""
    g = torch.Generator().manual_seed(5)
    out = []
    for u in range(updates):
        x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)
        if u in bad:
            x[0, 0] = torch.inf
        out.append({"x": x.to(dtype), "y": y})
    return out


def make(stage=0, k=1, model=None, **more):
    more = {"gradient_clipping": 0, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}, **more}
    return deepspeed.initialize(model=Net() if model is None else model, config=config(stage, k, **more))[0]


def data(n=4, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


def gradient(*weighted):
    """Plain torch's gradient of a weighted sum of losses, by name."""
    net = Net()
    sum(w * F.cross_entropy(net(x), y) for w, (x, y) in weighted).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}


def moved(engine):
    """What the update took away, with lr 1: the gradient."""
    start = dict(Net().named_parameters())
    return {n: start[n].detach() - x for n, x in engine.module.state_dict().items()}


def close(a, b):
    for n in b:
        torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-6)


a, b, c = data(seed=1), data(seed=2), data(seed=3)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        for f in self.layers:
            x = self.drop(f(x))
        return x

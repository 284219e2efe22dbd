"""One byte-level GPT as a pure function and as an nn.Module around the very same function, with torch's own train steps
for it: half of `bench_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

ADAMW = dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
Batch = dict[str, Tensor]  # "x" and "y": [B, T] int64
TrainStep = Callable[[Batch], Tensor]  # this rank's rows -> a loss: its own mean (torch) or everybody's (funczero)


# Model and batch (B: rows of the global batch); a measurement is `rounds` visits of `steps` steps each.
Size = NamedTuple("Size", [(field, int) for field in ("layers", "d", "heads", "vocab", "T", "B", "steps", "rounds")])
SIZES = {  # parameters: 21,472; 3,216,512; 3,487,232; 25,875,456
    "tiny": Size(layers=1, d=32, heads=2, vocab=256, T=16, B=2, steps=50, rounds=12),
    "blocks": Size(layers=64, d=64, heads=2, vocab=256, T=16, B=4, steps=5, rounds=8),
    "small": Size(layers=4, d=256, heads=4, vocab=1024, T=256, B=8, steps=4, rounds=8),
    "medium": Size(layers=8, d=512, heads=8, vocab=1024, T=256, B=4, steps=2, rounds=6),
}


def init_params(s: Size, seed: int = 0) -> dict:
    """The tree of parameters, the same on every rank: normal(0, 0.02) matrices, zero biases, unit norms."""
    g, d = torch.Generator().manual_seed(seed), s.d

    def make(name: str, *shape: int) -> Tensor:
        if name.endswith("_b"):
            return torch.zeros(shape)
        return torch.ones(shape) if name.startswith("ln") else torch.randn(shape, generator=g) * 0.02

    norms = {name: (d,) for n in ("ln1", "ln2") for name in (f"{n}_w", f"{n}_b")}
    linears = {"qkv": (3 * d, d), "out": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
    shapes = (
        norms
        | {f"{n}_w": shape for n, shape in linears.items()}
        | {f"{n}_b": shape[:1] for n, shape in linears.items()}
    )
    rest = {"embed": (s.vocab, d), "pos": (s.T, d), "ln_f_w": (d,), "ln_f_b": (d,)}
    return {n: make(n, *shape) for n, shape in rest.items()} | {
        "blocks": [{n: make(n, *shape) for n, shape in shapes.items()} for _ in range(s.layers)]
    }


def parameters(s: Size) -> int:
    """How many."""
    return (s.vocab + s.T + 2) * s.d + s.layers * (12 * s.d**2 + 13 * s.d)


def block(p: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """One pre-norm transformer block, x: [B, T, d]."""
    B, T, d = x.shape
    h = F.linear(F.layer_norm(x, (d,), p["ln1_w"], p["ln1_b"]), p["qkv_w"], p["qkv_b"])
    q, k, v = (t.view(B, T, heads, d // heads).transpose(1, 2) for t in h.split(d, dim=2))
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, d)
    x = x + F.linear(a, p["out_w"], p["out_b"])
    h = F.gelu(F.linear(F.layer_norm(x, (d,), p["ln2_w"], p["ln2_b"]), p["up_w"], p["up_b"]))
    return x + F.linear(h, p["down_w"], p["down_b"])


def summed_loss(p: dict[str, Tensor], run_blocks: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Cross-entropy summed over the tokens; the embedding is also the head."""
    x = run_blocks(F.embedding(batch["x"], p["embed"]) + p["pos"])
    logits = F.linear(F.layer_norm(x, x.shape[-1:], p["ln_f_w"], p["ln_f_b"]), p["embed"])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["y"].flatten(), reduction="sum")


class Block(nn.Module):
    """`block` over its own parameters."""

    def __init__(self, tree: dict[str, Tensor], heads: int):
        super().__init__()
        self.heads = heads
        for name, value in tree.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> Tensor:
        return block(self._parameters, x, self.heads)


class GPT(Block):
    """`summed_loss` over its own parameters, as the mean over its rows."""

    def __init__(self, tree: dict, heads: int):
        super().__init__({k: v for k, v in tree.items() if k != "blocks"}, heads)
        self.blocks = nn.Sequential(*(Block(b, heads) for b in tree["blocks"]))

    def forward(self, batch: Batch) -> Tensor:
        return summed_loss(self._parameters, self.blocks, batch) / batch["y"].numel()


def torch_step(module: nn.Module, params: Iterable[nn.Parameter], clip: float, autocast: bool) -> TrainStep:
    """Forward, backward, clip and fused AdamW, as torch's manuals write them."""
    opt = torch.optim.AdamW(params := list(params), fused=True, **ADAMW)

    def step(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module(batch)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return step


def peer(name: str, tree: dict, s: Size, clip: float, bf16: bool) -> TrainStep:
    """The train step of plain torch, DDP or FSDP2 over the default process group."""
    module = GPT(tree, s.heads)
    if name.startswith("fsdp"):
        mixed = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if bf16
            else MixedPrecisionPolicy()
        )
        wrap = dict(
            mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)),
            mp_policy=mixed,
            reshard_after_forward=name == "fsdp",
        )
        for b in module.blocks:
            fully_shard(b, **wrap)
        fully_shard(module, **wrap)
        return torch_step(module, module.parameters(), clip, autocast=False)
    if name.startswith("ddp"):
        module = DistributedDataParallel(module, gradient_as_bucket_view=name == "ddp-view")
    return torch_step(module, module.parameters(), clip, autocast=bf16)

"""What does Lightning's Trainer cost under funczero at each stage, next to itself under its DDP?

Run:
    python experiments/lightning_gpt.py                                   # DDP and stages 0 to 3, two processes each
    python experiments/lightning_gpt.py --contenders=ddp,3 --steps=60 --rounds=3 --width=512
    torchrun --nproc-per-node=2 experiments/lightning_gpt.py --contender=3   # one of them

How: this file is the script of a user: a GPT as a LightningModule over the bytes of Python's own library, automatic
optimization with two micro-batches an update, a clip and warmup. Only `strategy=` differs. Without --contender it
starts itself once for each of them under torchrun, in rounds, so that noise hits all alike. Time is the median update
without the first three, of the fastest round. Memory is the largest resident set of rank 0 above what it was after the
imports. Bits per byte are of held-out text.

Expect:
    The losses of all contenders agree to float32 rounding. Memory falls with the stage. Steps take as long as DDP's.
Found:
    --rounds=1 --steps=16 --length=64, 3,307,008 parameters (13 MiB a copy), two processes on two quiet cores, one life
    each:
           ms an update  /ddp   MiB    losses           bits a byte    furthest loss from DDP's
      ddp           300  1.00   124    5.8142 3.1037         4.5378
      stage 0       385  1.28   248    5.8142 3.1037         4.5378    1e-07
      stage 1       359  1.20   233    5.8142 3.1037         4.5378    1e-07
      stage 2       359  1.20   242    5.8142 3.1037         4.5378    9e-08
      stage 3       424  1.41   152    5.8142 3.1037         4.5378    9e-08
    Short of what is expected: an engine under Lightning takes a fifth to two fifths more than DDP for this small model.
    Losses agree to 2e-7. Memory is above DDP's at every stage, and least at stage 3; hf_finetune.py says what malloc
    has to do with it.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
from typing import Any

import contenders
import lightning
import torch
import torch.nn.functional as F
from absl import app, flags
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from funczero.data import corpus
from funczero.lightning import FunczeroStrategy

FLAGS = flags.FLAGS


class Text(Dataset):
    """Row i is the window of a corpus that (0, i) draws: inputs, and the bytes after them."""

    def __init__(self, text: corpus.Corpus, rows: int, length: int):
        self.text, self.rows, self.length = text, rows, length

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: x[0] for k, x in corpus.batch(self.text, 0, i, 1, self.length).items()}


class Block(nn.Module):
    """Attention and an MLP, each on top of a residual stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(lightning.LightningModule):
    """Bytes in, bytes out."""

    def __init__(self, width: int, layers: int, length: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))
        self.norm, self.head, self.losses = nn.LayerNorm(width), nn.Linear(width, 256, bias=False), list[float]()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean over all bytes."""
        x = self.embed(batch["x"]) + self.place.weight[: batch["x"].shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch["y"].flatten())

    def training_step(self, batch: dict[str, Tensor], i: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")))
        return loss

    def validation_step(self, batch: dict[str, Tensor], i: int) -> None:
        self.log("held", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Clock(Callback):
    """Seconds between the ends of updates."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int) -> None:
        if i % 2:
            self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Without the first three."""
        return statistics.median(b - a for a, b in zip(self.ends[2:], self.ends[3:], strict=False))


def most() -> int:
    """The largest resident set of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def dealt(data: Text, rows: int) -> DataLoader:
    """This rank's rows of global batches, in order."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return DataLoader(data, rows // world, sampler=DistributedSampler(data, world, rank, shuffle=False))


def contend(run: str) -> dict[str, Any]:
    """Train and evaluate as one rank; what was measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before, clock = most(), Clock()
    model = GPT(FLAGS.width, FLAGS.layers, FLAGS.length)
    size = sum(p.numel() for p in model.parameters())
    trainer = lightning.Trainer(
        accelerator="auto", devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy="ddp" if run == "ddp" else FunczeroStrategy(stage=int(run)), accumulate_grad_batches=2,
        gradient_clip_val=1.0, max_steps=FLAGS.steps, callbacks=[clock], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    train, held = corpus.load()
    trainer.fit(model, dealt(Text(train, FLAGS.steps * FLAGS.rows, FLAGS.length), FLAGS.rows // 2))
    peak = most() - before
    bits = trainer.validate(model, dealt(Text(held, 64, FLAGS.length), 16), verbose=False)[0]["held"] / math.log(2)
    losses = [sum(pair) / 2 for pair in zip(model.losses[::2], model.losses[1::2], strict=True)]
    return {"losses": losses, "bits": bits, "step": clock.median(), "peak": peak, "size": size}


if __name__ == "__main__":
    app.run(lambda _: contenders.run(__file__, contend, lambda name: contenders.torchrun()))

"""Lightning modules for tests, what plain torch makes of them, and their fits in a pool of processes."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

ROWS, K, EPOCH, CLIP = 4, 2, 3, 0.4  # rows of a global micro-batch, micro-batches an update, updates an epoch
SMALL = {"stage3_param_persistence_threshold": 10}


def tokens(rows=ROWS * K * EPOCH):
    g = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randint(0, 17, (rows, 6), generator=g))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.mlp(x)


class GPT(nn.Module):
    """Its head is its embedding."""

    def __init__(self, d=8, seed=0):
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.wte = nn.Embedding(17, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.head = nn.Linear(d, 17, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x):
        x = self.wte(x)
        for b in self.blocks:
            x = b(x)
        return self.head(x)


def loss_of(net, x):
    return F.cross_entropy(net(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten())


def optimizer_of(params):
    params = list(params)
    groups = [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() < 2], "lr": 2e-2}]
    o = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    return o, torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n))


def by_hand(clip=CLIP, algorithm="norm", k=K, updates=2 * EPOCH):
    """Plain torch's losses of micro-batches, its norms, and the net."""
    net, losses, norms = GPT(), [], []
    o, schedule = optimizer_of(net.parameters())
    micro = tokens().tensors[0].split(ROWS) * 2
    for u in range(updates):
        o.zero_grad()
        for x in micro[u * k : u * k + k]:
            loss = loss_of(net, x)
            (loss / k).backward()
            losses.append(loss.item())
        if clip and algorithm == "value":
            nn.utils.clip_grad_value_(net.parameters(), clip)
        else:
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip or 1e9).item())
        o.step()
        schedule.step()
    return losses, norms, net


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def loader(data, rows=ROWS):
    """This rank's rows of global batches."""
    return DataLoader(data, rows // world(), sampler=DistributedSampler(data, world(), rank(), shuffle=False))


def mean_over_ranks(losses):
    x = torch.tensor(losses, dtype=torch.float64)
    if world() > 1:
        torch.distributed.all_reduce(x)
    return (x / world()).tolist()


def quiet():
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def modules():
    """The Lightning modules; made here, because importing lightning takes seconds."""
    import lightning as L

    class Text(L.LightningModule):
        def __init__(self, late=False, meta=False):
            super().__init__()
            self.net, self.late, self.meta = None if late else GPT(), late, meta
            self.losses, self.validated, self.norms = [], [], []
            self.save_hyperparameters()

        def configure_model(self):
            if self.net is None:
                with torch.device("meta" if self.meta else "cpu"):
                    self.net = GPT()

        def training_step(self, batch, i):
            loss = loss_of(self.net, batch[0])
            self.log("loss", loss, sync_dist=True)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, i):
            loss = loss_of(self.net, batch[0])
            self.log("validated", loss, sync_dist=True)
            self.validated.append(loss.item())

        def test_step(self, batch, i):
            self.log("tested", loss_of(self.net, batch[0]), sync_dist=True)

        def predict_step(self, batch, i):
            return self.net(batch[0])

        def configure_optimizers(self):
            o, schedule = optimizer_of(self.parameters())
            return {"optimizer": o, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Text


def trainer(strategy, folder=None, **more):
    import lightning as L

    quiet()
    still = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    kept = {"enable_checkpointing": folder is not None, "default_root_dir": folder}
    loop = {"max_epochs": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return L.Trainer(accelerator="cpu", devices=world(), strategy=strategy, **{**still, **kept, **loop, **more})


def ours(stage, **more):
    from funczero.lightning import FunczeroStrategy

    return FunczeroStrategy(stage=stage, zero=SMALL, **more)


def fit(stage, folder, resume=None, stop=None, late=False, meta=False):
    """The losses of a fit, whole weights, and what validate, test and predict say."""
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, i):
            if trainer.global_step == stop:
                raise ZeroDivisionError

    module = modules()(late, meta)
    saves = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    t = trainer(
        ours(stage),
        folder,
        callbacks=[saves, Stop()],
        accumulate_grad_batches=K,
        gradient_clip_val=CLIP,
        max_epochs=2,
    )
    data = loader(tokens()), loader(tokens(8))
    try:
        t.fit(module, *data, ckpt_path=resume)
    except ZeroDivisionError:
        return {"losses": mean_over_ranks(module.losses)}
    out = {
        "losses": mean_over_ranks(module.losses),
        "validated": mean_over_ranks(module.validated),
        "norm": t.strategy.grad_norm(),
        "lr": [g["lr"] for g in t.optimizers[0].param_groups],
        "held": sum(x.numel() for x in t.strategy.engines.each[0].engine.state.params.leaves()),
        "validate": t.validate(module, data[1], verbose=False)[0]["validated"],
        "test": t.test(module, data[1], verbose=False)[0]["tested"],
        "predict": [x[0, 0].tolist() for x in t.predict(module, data[1])],
    }
    t.save_checkpoint(str(Path(folder, "last.ckpt")))
    return out


def mlp(i, h, o, seed):
    torch.manual_seed(seed)
    inner = nn.Sequential(*(nn.Sequential(nn.Linear(h, h), nn.Tanh()) for _ in range(2)))
    return nn.Sequential(nn.Linear(i, h), nn.Tanh(), inner, nn.Linear(h, o))


def real_and_noise():
    g = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(24, 6, generator=g), torch.randn(24, 3, generator=g))


def gan_step(nets, optimizers, backward, batch, order, toggled):
    """One round as the pages write it; returns both losses.

    Args:
      order: "before" clears gradients right before a backward, "after" right after a step.
      toggled: a context manager of an optimizer.
    """
    (g, d), (og, od), (real, noise) = nets, optimizers, batch
    bce = F.binary_cross_entropy_with_logits
    losses = []
    for who, o in (("d", od), ("g", og)):
        with toggled(o):
            if who == "d":
                out, fake = d(real), d(g(noise).detach())
                loss = bce(out, torch.ones_like(out)) + bce(fake, torch.zeros_like(fake))
            else:
                out = d(g(noise))
                loss = bce(out, torch.ones_like(out))
            if order == "before":
                o.zero_grad()
            backward(loss)
            o.step()
            if order == "after":
                o.zero_grad()
            losses.append(loss.item())
    return losses


def gan_optimizers(g, d):
    both = torch.optim.Adam(g.parameters(), lr=1e-2, betas=(0.5, 0.9)), torch.optim.AdamW(d.parameters(), lr=2e-2)
    return both, [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in both]


def gan_by_hand(order="before"):
    """Plain torch."""
    from contextlib import nullcontext

    g, d = mlp(3, 8, 6, 1), mlp(6, 8, 1, 0)
    optimizers, schedules = gan_optimizers(g, d)
    losses = []
    for batch in zip(*(x.split(4) for x in real_and_noise().tensors), strict=True):
        losses += gan_step((g, d), optimizers, lambda x: x.backward(), batch, order, lambda o: nullcontext())
        for s in schedules:
            s.step()
    return losses, {"g": g.state_dict(), "d": d.state_dict()}


def gan_fit(stage, folder, order="before", toggle=False):
    """Two optimizers and manual optimization."""
    from contextlib import nullcontext

    import lightning as L

    class Gan(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.g, self.d, self.losses = mlp(3, 8, 6, 1), mlp(6, 8, 1, 0), []

        def training_step(self, batch, i):
            own = (lambda o: o.toggle_model()) if toggle else (lambda o: nullcontext())
            nets, optimizers = (self.g, self.d), self.optimizers()
            self.losses += gan_step(nets, optimizers, self.manual_backward, batch, order, own)
            for s in self.lr_schedulers():
                s.step()

        def configure_optimizers(self):
            both, schedules = gan_optimizers(self.g, self.d)
            return list(both), schedules

    module = Gan()
    t = trainer(ours(stage), folder)
    t.fit(module, loader(real_and_noise()))
    t.save_checkpoint(str(Path(folder, "gan.ckpt")))
    return mean_over_ranks(module.losses), t.global_step

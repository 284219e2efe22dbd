"""Lightning modules for tests, what plain torch makes of them, and their fits in a pool of processes."""

from __future__ import annotations

import copy
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
    groups = [
        {"params": [p for p in params if p.dim() > 1]},
        {"params": [p for p in params if p.dim() < 2], "lr": 2e-2},
    ]
    o = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    return o, torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n))


def by_hand(clip=CLIP, algorithm="norm", k=K, updates=2 * EPOCH, half=None):
    """Plain torch's losses of micro-batches, its norms, and the net.

    Args:
      half: forwards and backwards of a copy in this dtype.
    """
    net, losses, norms = GPT(), [], []
    o, schedule = optimizer_of(net.parameters())
    micro = tokens().tensors[0].split(ROWS) * 2
    for u in range(updates):
        o.zero_grad()
        copied = net if half is None else copy.deepcopy(net).to(half)
        for x in micro[u * k : u * k + k]:
            loss = loss_of(copied, x)
            grads = torch.autograd.grad(loss / k, list(copied.parameters()))
            for p, g in zip(net.parameters(), grads, strict=True):
                p.grad = g.float() if p.grad is None else p.grad + g.float()
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
    """The class; made here, because importing lightning takes seconds."""
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


def fit(stage, folder, resume=None, stop=None, end=None):
    """The losses of a fit, and what validate, test and predict say; whole weights are in folder/last.ckpt.

    Args:
      stop: the update after which the loop ends in the middle of an epoch, by `end`, or with the losses so far.
    """
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, i):
            if trainer.global_step == stop:
                if end is not None:
                    end(mean_over_ranks(module.losses))
                raise ZeroDivisionError

    module = modules()()
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


def dealt(data, k=4, rows=2):
    """Whole micro-batches in turns, k an update over all ranks: the same ones in every world."""
    micros = [list(range(i, i + rows)) for i in range(0, len(data) // (k * rows) * k * rows, rows)]
    return DataLoader(data, batch_sampler=micros[rank() :: world()])


def exact(stages, folder):
    """Hashes of whole weights after a fit of the Trainer, and after updates by Fabric, by stage, on rank 0."""
    from lightning.fabric import Fabric

    from funczero.lightning import FabricStrategy
    from funczero.testing import tree_hash

    out = {}
    for stage in stages:
        module, k = modules()(), 4 // world()
        torch.manual_seed(0)
        t = trainer(ours(stage, sums="exact"), accumulate_grad_batches=k, gradient_clip_val=CLIP)
        t.fit(module, dealt(tokens()))
        weights = t.strategy.lightning_module_state_dict()
        f = Fabric(accelerator="cpu", devices=world(), strategy=FabricStrategy(stage, zero=SMALL, sums="exact"))
        f.launch()
        net, o = f.setup(*(lambda net: (net, optimizer_of(net.parameters())[0]))(GPT()))
        for n, (x,) in enumerate(dealt(tokens())):
            f.backward(loss_of(net, x) / k)
            if n % k == k - 1:
                o.step()
                o.zero_grad()
        f.save(str(Path(folder, "net.ckpt")), {"net": net})
        if rank() == 0:
            out[stage] = tree_hash(weights), tree_hash(torch.load(Path(folder, "net.ckpt"))["net"])
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


def fabric_gan(stage, folder, resume=None, stop=None, end=None):
    """The same round under Fabric: two modules, each with its optimizer. Before batch `stop`, `end` gets the losses."""
    from contextlib import nullcontext

    from lightning.fabric import Fabric

    from funczero.lightning import FabricStrategy

    quiet()
    f = Fabric(accelerator="cpu", devices=world(), strategy=FabricStrategy(stage, zero=SMALL))
    f.launch()
    with f.init_module():
        g, d = mlp(3, 8, 6, 1), mlp(6, 8, 1, 0)
    (og, od), _ = gan_optimizers(g, d)
    (g, og), (d, od) = f.setup(g, og), f.setup(d, od)
    schedules, losses, first = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (og, od)], [], 0
    if resume:
        rest = f.load(resume, {"g": g, "d": d, "og": og, "od": od})
        first = rest["n"]
        for s, kept in zip(schedules, rest["schedules"], strict=True):
            s.load_state_dict(kept)
    for n, batch in enumerate(f.setup_dataloaders(loader(real_and_noise()), use_distributed_sampler=False)):
        if n < first:
            continue
        if n == stop:
            end(mean_over_ranks(losses))
        losses += gan_step((g, d), (og, od), f.backward, batch, "before", lambda o: nullcontext())
        for s in schedules:
            s.step()
        if n == 2 and not resume:
            kept = {"n": 3, "schedules": [s.state_dict() for s in schedules]}
            f.save(str(Path(folder, "half.ckpt")), {"g": g, "d": d, "og": og, "od": od, **kept})
    return mean_over_ranks(losses)


def beside(stage, kind):
    """(losses of ours, losses under Lightning's DDPStrategy) of one more way to use a Trainer."""
    more, late = {}, False
    if kind in ("bf16-mixed", "bf16-true", "16-mixed"):
        more = {"precision": kind}
    elif kind == "16-mixed with a scaler":
        from lightning.pytorch.plugins import MixedPrecision

        more = {"gradient_clip_val": CLIP}
        scaled = lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    elif kind == "clip by value":
        more = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}
    elif kind == "a short window":
        more = {"accumulate_grad_batches": 4, "max_epochs": 2}
    elif kind == "configure_model":
        late = True
    out = []
    for strategy in (ours(stage), "ddp"):
        torch.manual_seed(7)
        if kind == "16-mixed with a scaler":
            more["plugins"] = scaled()
        module, t = modules()(late), trainer(strategy, **more)
        first = t.validate(module, loader(tokens(8)), verbose=False)[0]["validated"]
        t.fit(module, loader(tokens()), loader(tokens(8)))
        last = t.validate(module, loader(tokens(8)), verbose=False)[0]["validated"]
        out.append(mean_over_ranks(module.losses) + mean_over_ranks(module.validated) + [first, last])
    return out


def late_on_meta(stage):
    """Losses of a module that configure_model builds on meta; and the largest part that a rank holds."""
    torch.manual_seed(7)
    module = modules()(late=True, meta=True)
    t = trainer(ours(stage))
    t.fit(module, loader(tokens()))
    return mean_over_ranks(module.losses), module.net.head.weight is module.net.wte.weight


def normed(stage):
    """Batch norm: (numbers of ours, numbers under Lightning's DDPStrategy), running statistics included."""
    import lightning as L

    class Normed(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
            self.losses = []

        def training_step(self, batch, i):
            loss = self.net(batch[0]).square().mean()
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, i):
            self.losses.append(self.net(batch[0]).square().mean().item())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    out = []
    for strategy in (ours(stage), "ddp"):
        module, t = Normed(), trainer(strategy, max_epochs=2)
        t.fit(module, loader(real_and_noise()), loader(real_and_noise()))
        state = t.strategy.lightning_module_state_dict()
        out.append(mean_over_ranks(module.losses) + (state["net.1.running_var"].tolist() if rank() == 0 else []))
    return out


def demos(stage):
    """Lightning's own models, unmodified: the largest gap of weights to those under its DDPStrategy."""
    import lightning as L
    from lightning.pytorch.demos import Transformer, boring_classes

    class Words(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = Transformer(vocab_size=17, ninp=16, nhead=2, nhid=16, nlayers=2, dropout=0.0)

        def training_step(self, batch, i):
            x = batch[0]
            return F.nll_loss(self.layer(x[:, :-1], x[:, 1:]), x[:, 1:].reshape(-1))

        def train_dataloader(self):
            return loader(tokens())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    gaps = {}
    for made in (boring_classes.BoringModel, boring_classes.ManualOptimBoringModel, Words):
        found = []
        for strategy in (ours(stage), "ddp"):
            torch.manual_seed(1)
            module, dealt = made(), made is not Words
            t = trainer(
                strategy, use_distributed_sampler=dealt, limit_train_batches=6, limit_val_batches=2, max_epochs=2
            )
            t.fit(module)
            found.append(t.strategy.lightning_module_state_dict())
        if rank() == 0:
            gaps[made.__name__] = max((found[1][n] - x).abs().max().item() for n, x in found[0].items())
    return gaps


def refused(stage):
    """What is refused, with its words."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
    from lightning.pytorch.utilities import grad_norm

    base = modules()
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)

    class Manual(base):
        automatic_optimization = False

    class Backward(base):
        def backward(self, loss):
            loss.backward()

    class Nothing(base):
        def configure_optimizers(self):
            return None

    class Shared(Manual):
        def configure_optimizers(self):
            return [sgd(self.parameters()), sgd(self.net.blocks.parameters())]

    class Mixed(Manual):
        def configure_optimizers(self):
            params = list(self.parameters())
            return [sgd([p for p in params if p.dim() > 1]), sgd([p for p in params if p.dim() < 2])]

    class Direct(Manual):
        def training_step(self, batch, i):
            super().training_step(batch, i).backward()
            self.optimizers().step()

    class Kept(Manual):
        def training_step(self, batch, i):
            self.manual_backward(super().training_step(batch, i))
            self.optimizers().step()

    class Normed(base):
        def on_before_optimizer_step(self, optimizer):
            grad_norm(self, 2)

    class Unfrozen(base):
        def on_train_batch_start(self, batch, i):
            self.optimizers().add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    class Raw(Manual):
        def training_step(self, batch, i):
            self.manual_backward(super().training_step(batch, i))
            self.raw.step()

        def configure_optimizers(self):
            self.raw = sgd(self.parameters())
            return self.raw

    class Clipped(Manual):
        def training_step(self, batch, i):
            loss = super().training_step(batch, i)
            self.manual_backward(loss, retain_graph=True)
            self.clip_gradients(self.optimizers(), 0.1, "norm")
            self.manual_backward(loss)

    class Written(base):
        def on_train_batch_start(self, batch, i):
            self.net.wte.weight.data.clamp_(-0.1, 0.1)

    asked = {
        "raw": (Raw, {}),
        "clipped": (Clipped, {}),
        "written": (Written, {}),
        "backward": (Backward, {}),
        "nothing": (Nothing, {}),
        "shared": (Shared, {}),
        "mixed": (Mixed, {}),
        "direct": (Direct, {}),
        "kept": (Kept, {}),
        "normed": (Normed, {}),
        "unfrozen": (Unfrozen, {}),
        "swa": (base, {"callbacks": [StochasticWeightAveraging(1e-2)]}),
        "averaged": (base, {"callbacks": [WeightAveraging()]}),
        "sync_batchnorm": (base, {"sync_batchnorm": True}),
        "64-true": (base, {"precision": "64-true"}),
    }
    said = {}
    for name, (made, more) in asked.items():
        try:
            trainer(ours(stage), **more).fit(made(), loader(tokens()))
            said[name] = "went through"
        except (ValueError, TypeError, RuntimeError) as e:
            said[name] = str(e)
    t = trainer(ours(stage))
    t.fit(base(), loader(tokens()))
    try:
        uneven = TensorDataset(tokens().tensors[0][: 5 - rank()])
        t.predict(t.lightning_module, DataLoader(uneven, 1))
    except ValueError as e:
        said["uneven"] = str(e)
    return said

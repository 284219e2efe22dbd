"""Five programs as a new user writes them, at stages 0 to 3 on two processes, against plain torch on the same rows
without sharding.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funczero.deepspeed as deepspeed
from funczero.deepspeed import comm

STAGES = range(4)


def config(stage, micro=4, k=1, lr=1e-2, **more):
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.01}}}
    zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20}}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": k,
        "gradient_clipping": 1.0,
        **optimizer,
        **zero,
        **more,
    }


def mine(x, k=1):
    """This rank's micro-batches of a global batch."""
    return x.chunk(comm.get_world_size())[comm.get_rank()].chunk(k)


def averaged(nets, losses, optimizer, clip=1.0):
    """Plain data-parallel training by hand: copies of a net, one for each rank, and the mean of their gradients."""
    for net in nets:
        net.zero_grad()
    for loss in losses:
        loss.backward()
    for ps in zip(*(net.parameters() for net in nets), strict=True):
        ps[0].grad = sum(p.grad for p in ps) / len(ps)
    if clip:
        nn.utils.clip_grad_norm_(nets[0].parameters(), clip)
    optimizer.step()
    with torch.no_grad():
        for ps in zip(*(net.parameters() for net in nets), strict=True):
            for p in ps[1:]:
                p.copy_(ps[0])


def gap(engine, net):
    whole = engine.module.state_dict()
    return max((whole[n].double() - x.double()).abs().max().item() for n, x in net.state_dict().items())


# --- 1: an image classifier -------------------------------------------------------------------------------------------
def conv(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def classifier_net():
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8),
        nn.Sequential(*(conv(8, 8) for _ in range(3))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def classifier(stage):
    engine, _, _, _ = deepspeed.initialize(model=classifier_net(), config=config(stage))
    criterion = nn.CrossEntropyLoss()
    nets = [classifier_net() for _ in range(comm.get_world_size())]
    plain = torch.optim.AdamW(nets[0].parameters(), lr=1e-2, weight_decay=0.01)
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        x, y = torch.randn(8, 3, 6, 6, generator=g), torch.randint(5, (8,), generator=g)
        images, labels = mine(x)[0], mine(y)[0]
        outputs = engine(images)
        loss = criterion(outputs, labels)
        engine.backward(loss)
        engine.step()
        with torch.no_grad():
            engine.eval()
            engine(images)
            engine.train()
        averaged(
            nets,
            [criterion(n(a), b) for n, a, b in zip(nets, x.chunk(len(nets)), y.chunk(len(nets)), strict=True)],
            plain,
        )
    return gap(engine, nets[comm.get_rank()])


# --- 2: a masked-language model ---------------------------------------------------------------------------------------
class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, 30)
        self.head.weight = self.embed.weight

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def masked(stage, k=4):
    engine, _, _, _ = deepspeed.initialize(model=Masked(), config=config(stage, 2, k, 3e-3, bf16={"enabled": True}))
    net = Masked()
    plain = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    g, size, losses = torch.Generator().manual_seed(2), comm.get_world_size(), []
    for _ in range(4):
        tokens = torch.randint(1, 30, (2 * k * size, 7), generator=g)
        labels = torch.where(torch.rand(tokens.shape, generator=g) < 0.4, tokens, -100)
        tokens = torch.where(labels > 0, 0, tokens)
        for t, y in zip(mine(tokens, k), mine(labels, k), strict=True):
            loss = engine(t, y)
            engine.backward(loss)
            engine.step()
        half = copy.deepcopy(net).bfloat16()
        grads = []
        for t, y in zip(tokens.chunk(k * size), labels.chunk(k * size), strict=True):
            grads.append([x.float() for x in torch.autograd.grad(half(t, y), list(half.parameters()))])
        for p, *gs in zip(net.parameters(), *grads, strict=True):
            p.grad = sum(gs) / len(gs)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        plain.step()
        losses.append(loss.item())
    masters = engine.train_step.params(engine.state)
    return max((masters[n] - p.detach()).abs().max().item() for n, p in net.named_parameters())


# --- 3: a GAN ---------------------------------------------------------------------------------------------------------
def mlp(i, h, o, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(i, h),
        nn.Tanh(),
        nn.Sequential(*(nn.Sequential(nn.Linear(h, h), nn.Tanh()) for _ in range(2))),
        nn.Linear(h, o),
    )


def gan(stage):
    loss_of = F.binary_cross_entropy_with_logits
    d_engine, _, _, _ = deepspeed.initialize(model=mlp(6, 8, 1, 0), config=config(stage))
    g_engine, _, _, _ = deepspeed.initialize(model=mlp(3, 8, 6, 1), config=config(3 - stage))
    d, g = mlp(6, 8, 1, 0), mlp(3, 8, 6, 1)
    d_plain, g_plain = (torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.01) for m in (d, g))
    generator = torch.Generator().manual_seed(3)
    one, zero = (lambda x: torch.ones_like(x)), (lambda x: torch.zeros_like(x))
    for _ in range(4):
        real_all, noise_all = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        real, noise = mine(real_all)[0], mine(noise_all)[0]
        fake = g_engine(noise)
        out = d_engine(real)
        d_engine.backward(loss_of(out, one(out)))
        out = d_engine(fake.detach())
        d_engine.backward(loss_of(out, zero(out)))
        d_engine.step()
        out = d_engine(fake)
        g_engine.backward(loss_of(out, one(out)))
        g_engine.step()

        fake = g(noise_all)
        averaged([d], [loss_of(d(real_all), torch.ones(8, 1)) + loss_of(d(fake.detach()), torch.zeros(8, 1))], d_plain)
        averaged([g], [loss_of(d(fake), torch.ones(8, 1))], g_plain)
    return max(gap(d_engine, d), gap(g_engine, g))


# --- 4: a client optimizer with a schedule of the kind of Hugging Face ------------------------------------------------
def scheduled(stage, k=2):
    def linear(optimizer, warmup, total):
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: n / warmup if n < warmup else max(0.0, (total - n) / (total - warmup))
        )

    model, net = mlp(4, 8, 3, 4), mlp(4, 8, 3, 4)
    optimizer, plain = (torch.optim.AdamW(m.parameters(), lr=2e-2, betas=(0.9, 0.98)) for m in (model, net))
    c = {key: x for key, x in config(stage, 2, k).items() if key != "optimizer"}
    engine, face, _, scheduler = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=linear(optimizer, 2, 8), config=c
    )
    other, g = linear(plain, 2, 8), torch.Generator().manual_seed(5)
    for _ in range(6):
        x, y = torch.randn(4 * comm.get_world_size(), 4, generator=g), torch.randint(
            3, (4 * comm.get_world_size(),), generator=g
        )
        for a, b in zip(mine(x, k), mine(y, k), strict=True):
            loss = F.cross_entropy(engine(a), b)
            engine.backward(loss)
            engine.step()
            face.zero_grad()
        averaged([net], [F.cross_entropy(net(x), y)], plain)
        other.step()
        assert scheduler.get_last_lr() == other.get_last_lr() == engine.get_lr()
    return gap(engine, net)


# --- 5: zero.Init and GatheredParameters ------------------------------------------------------------------------------
class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(9, 3)
        self.gain = nn.Parameter(torch.full((9,), 0.5))

    def forward(self, x):
        for b in self.blocks:
            x = x + b(x)
        return self.last(x * self.gain)


def gathered(stage):
    torch.manual_seed(6 + comm.get_rank())  # rank 0's values count
    with deepspeed.zero.Init(config_dict_or_path=config(stage)):
        model = Deep()
    torch.manual_seed(6)
    net = Deep()
    assert all(
        p.device == q.device and p.stride() == (0,) * p.dim() and p.shape == q.shape
        for p, q in zip(model.parameters(), net.parameters(), strict=True)
    )
    held = sum(p.part.numel() for p in model.parameters())
    assert held <= sum(q.numel() for q in net.parameters()) / comm.get_world_size() + 9 * 9
    with pytest.raises(RuntimeError, match="is sharded"):
        nn.init.zeros_(model.last.bias)
    with deepspeed.zero.GatheredParameters(model.last.parameters(), modifier_rank=0):
        if comm.get_rank() == 0:
            nn.init.zeros_(model.last.bias)
    nn.init.zeros_(net.last.bias)
    with (
        pytest.raises(RuntimeError, match="'weight' was written to on this rank alone; write modifier_rank=0"),
        deepspeed.zero.GatheredParameters(model.last.weight),
    ):
        nn.init.zeros_(model.last.weight)
    with torch.no_grad():
        net.last.weight.zero_()
    engine, _, _, _ = deepspeed.initialize(model=model, config=config(stage))
    plain, g = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01), torch.Generator().manual_seed(7)
    for u in range(5):
        x, y = torch.randn(8, 9, generator=g), torch.randint(3, (8,), generator=g)
        engine.backward(F.cross_entropy(engine(mine(x)[0]), mine(y)[0]))
        engine.step()
        averaged([net], [F.cross_entropy(net(x), y)], plain)
        if u == 2:
            weight = engine.module.blocks[1][0].weight if stage < 3 else model.blocks[1][0].weight
            with deepspeed.zero.GatheredParameters([weight, model.gain], modifier_rank=1):
                assert weight.shape == (9, 9) and weight.is_contiguous()
                torch.testing.assert_close(weight.detach(), net.blocks[1][0].weight.detach(), rtol=1e-4, atol=1e-5)
                if comm.get_rank() == 1:
                    with torch.no_grad():
                        weight.mul_(0.5)
                        model.gain.add_(1)
            with torch.no_grad():
                net.blocks[1][0].weight.mul_(0.5)
                net.gain.add_(1)
            with deepspeed.zero.GatheredParameters(model):
                assert sum(p.detach().sum() for p in model.parameters()).isfinite()
            with (
                pytest.raises(RuntimeError, match="'gain' was written to, and would be lost; write modifier_rank=0"),
                deepspeed.zero.GatheredParameters([model.gain]),
                torch.no_grad(),
            ):
                model.gain.zero_()
    return gap(engine, net)


PROGRAMS = [classifier, masked, gan, scheduled, gathered]
ALWAYS = [(3, program) for program in PROGRAMS] + [(i % 3, program) for i, program in enumerate(PROGRAMS)]
EVERYWHERE = [
    pytest.param(stage, program, marks=() if (stage, program) in ALWAYS else pytest.mark.slow)
    for stage in STAGES
    for program in PROGRAMS
]


@pytest.mark.parametrize(("stage", "program"), EVERYWHERE)
def test_programs_give_plain_torchs_weights(run_world, program, stage):
    gaps = run_world(2, program, stage, timeout=120)
    assert max(gaps) < (2e-4 if program is masked else 3e-5), gaps


def test_programs_on_one_process():
    assert all(p(s) < (2e-4 if p is masked else 3e-5) for p in (classifier, masked, gan, scheduled) for s in (0, 3))


def hugging_face(stage, checkpointing):
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=3, n_head=2, pad_token_id=0)
    )
    if checkpointing:
        model.gradient_checkpointing_enable()
    engine, _, _, _ = deepspeed.initialize(model=model, config=config(stage, 2, 2, bf16={"enabled": True}))
    engine.train()
    torch.manual_seed(5)
    losses = []
    for i in range(4):
        ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(i))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        said = engine.module.generate(
            ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), max_new_tokens=4, do_sample=False
        )
    return losses, engine.get_global_grad_norm(), said.tolist(), engine.module.config.n_layer


def test_a_hugging_face_model_with_dropout_and_checkpointing_is_the_same_at_every_stage(run_world):
    pytest.importorskip("transformers")
    results = [
        run_world(2, hugging_face, stage, again) for stage, again in ((0, False), (2, True), (3, False), (3, True))
    ]
    assert all(r == results[0] for r in results) and results[0][0][0][-1] < results[0][0][0][0]


class Watched(nn.Linear):
    """Notes how many elements of all that was built so far are in memory, each time one more is there."""

    built: list = []
    seen: list = []

    def __init__(self, *args):
        super().__init__(*args)
        Watched.built.append(self)
        Watched.seen.append(
            sum((p.part if hasattr(p, "part") else p).numel() for m in Watched.built for p in m.parameters())
        )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Watched(16, 64), Watched(64, 16)


def built_in_pieces():
    Watched.built.clear()
    Watched.seen.clear()
    with deepspeed.zero.Init():
        nn.ModuleList(Pair() for _ in range(6))
    total, largest = 6 * (2 * 16 * 64 + 80), 16 * 64 + 64
    return (
        max(Watched.seen) <= total / comm.get_world_size() + largest
        and sum(p.part.numel() for m in Watched.built for p in m.parameters()) == total / comm.get_world_size()
    )


def test_a_rank_holds_its_share_and_one_module_while_a_model_is_built(run_world):
    assert all(run_world(2, built_in_pieces))


ALONE = """
import torch, torch.nn.functional as F
import funczero.deepspeed as deepspeed
from torch import nn
net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
zero = {"zero_optimization": {"stage": 3, "param_persistence_threshold": 0}}
engine, *_ = deepspeed.initialize(model=net, config={"train_batch_size": 8, "optimizer": {"type": "Adam"}, **zero})
x = torch.ones(4, 8)
for step in range(4):
    engine.backward(engine(x).square().mean())
    engine.step()
    if step == 1 and deepspeed.comm.get_rank() == 0:
        with torch.no_grad():
            engine(x)
print("went on")
"""


@pytest.mark.slow
def test_an_evaluation_of_rank_0_alone_ends_with_rank_call_and_remedy(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "alone.py"),
    ]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "went on" not in done.stdout and time.monotonic() - start < 25
    said = next(line for line in done.stderr.splitlines() if line.startswith("funczero: "))
    assert (
        "rank 0 launched all_gather" in said
        and "in engine(batch) under no_grad" in said
        and "every rank must make the same calls: engine(batch) on all ranks or on none" in said
    )

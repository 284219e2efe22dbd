"""The page's config, and bf16 ZeRO-2 with accumulation, clipping and WarmupDecayLR: the training script's losses are
plain torch's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from ends import line

import funczero as fz

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SIZES = dict(layers=2, width=32, heads=2)
LENGTH, STEPS, WORLD = 16, 16, 2
PAGE = {
    "train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
    "fp16": {"enabled": True}, "zero_optimization": True,
}  # fmt: skip
BF16 = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 14, "warmup_num_steps": 4, "warmup_max_lr": 1e-2},
    },
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
}


def life(text, name):
    """Where a run is told: not among the texts that it reads."""
    return text.with_name(f"{text.name} {name}")


def start(ends, text, name, size, *flags, config=None):
    """A command line of one process, or the same as `size` ranks that somebody else has started."""
    (text / f"{name}.json").write_text(json.dumps(config))
    small = [f"--{k}={v}" for k, v in SIZES.items()] + [
        f"--length={LENGTH}",
        f"--steps={STEPS}",
        "--eval_every=100",
        "--eval_batches=1",
        "--sample=0",
    ]
    own = [f"--deepspeed_config={text}/{name}.json", f"--nproc={WORLD}", f"--data={text}", f"--out={text}/{name}"]
    ends.start(
        life(text, name), line(EXPERIMENTS / "train_gpt.py", *small, *own, *flags), size, limit=120.0, short=True
    )


def losses(ends, text, name):
    for rank in ends.told(life(text, name), limit=120.0):
        assert rank["code"] == 0, rank
    return [r for r in map(json.loads, (text / name / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def plain(gpt, text, batch_size, micros, dtype, clip, lr, scale=0.0, **adamw):
    """Unsharded torch: float32 masters, autograd in dtype, torch's AdamW with its grad_scale; (loss, lr, applied) of
    every update.

    Micro-batches are added in pairs: a sum rounded otherwise in float32 tips a 16-bit weight now and then, and the loss
    by 1e-5.
    """
    corpus, _ = fz.data.load([str(text)])
    flat, spec = torch.utils._pytree.tree_flatten(gpt.init(0, gpt.Sizes(**SIZES)))
    masters = [x.clone().requires_grad_() for x in flat]
    optimizer, hysteresis, updates, log = torch.optim.AdamW(masters, lr=1.0, fused=True, **adamw), 2, 0, []
    for t in range(STEPS):
        batch = fz.data.batch(corpus, 0, t, batch_size, LENGTH)
        total, weight, sums = 0.0, 0.0, []
        n = 2.0 ** round(math.log2(batch_size * LENGTH))
        for x, y in zip(batch["x"].chunk(micros), batch["y"].chunk(micros), strict=True):
            leaves = [m.detach().to(dtype).requires_grad_() for m in masters]
            loss, w = gpt.loss_fn(torch.utils._pytree.tree_unflatten(leaves, spec), {"x": x, "y": y}, SIZES["heads"])
            seed = torch.tensor(scale / n if scale else 1.0)
            sums.append([g.float() for g in torch.autograd.grad(loss, leaves, seed)])
            total, weight = total + loss.item(), weight + w.item()
        while len(sums) > 1:
            sums = [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(sums[::2], sums[1::2], strict=True)]
        grads = sums[0]
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt() / (
            weight * (scale / n if scale else 1.0)
        )
        log.append((total / weight, lr(updates), bool(norm.isfinite())))
        if not norm.isfinite():
            hysteresis, scale = (hysteresis - 1, scale) if hysteresis > 1 else (1, scale / 2)
            continue
        factor = min(1.0, clip / (norm.item() + 1e-6)) / (weight * (scale / n if scale else 1.0))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1 / factor, dtype=torch.float32), torch.zeros(())
        for m, g in zip(masters, grads, strict=True):
            m.grad = g
        optimizer.param_groups[0]["lr"] = lr(updates)
        optimizer.step()
        updates += 1
    return log


def warmup_decay(u, peak=1e-2, n=4, total=14):
    """DeepSpeed's WarmupDecayLR after u steps, by hand."""
    i = max(u - 1, 0)
    return peak * (math.log(i + 1) / math.log(n) if i < n else max(0.0, (total - i) / (total - n)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["page", "bf16"])
def test_a_config_trains_to_plain_torchs_losses(ends, text, gpt, name):
    start(ends, text, name, WORLD, config={"page": PAGE, "bf16": BF16}[name])
    if name == "page":
        want = plain(gpt, text, 8, WORLD, torch.float16, 1.0, lambda u: 0.00015, scale=65536.0, weight_decay=0.0)
    else:
        want = plain(gpt, text, 16, 4 * WORLD, torch.bfloat16, 0.5, warmup_decay, betas=(0.9, 0.95), weight_decay=0.1)
    got = losses(ends, text, name)
    assert [r["ok"] for r in got] == [ok for *_, ok in want] and sum(r["ok"] for r in got) > STEPS // 2
    assert [r["lr"] for r in got] == pytest.approx([lr for _, lr, _ in want], rel=1e-12)
    assert [r["loss"] for r in got] == pytest.approx([loss for loss, *_ in want], rel=2e-6)
    print(
        name,
        max(abs(r["loss"] - loss) for r, (loss, *_) in zip(got, want)),
        [r["ok"] for r in got],
        got[0]["loss"],
        got[-1]["loss"],
    )
    assert name == "page" or got[-1]["loss"] < 0.8 * got[0]["loss"]


def test_a_config_and_flags_that_say_it_twice_end_with_one_sentence(ends, text):
    start(ends, text, "twice", 1, "--stage=2", config=PAGE)
    start(ends, text, "broken", 1, config={**PAGE, "gradient_cliping": 0.5})
    for name, said in (
        ("twice", "train_gpt: --stage=2 and --deepspeed_config="),
        ("broken", "train_gpt: broken.json:1: gradient_cliping: there is no such key; write 'gradient_clipping'\n"),
    ):
        (told,) = ends.told(life(text, name))
        assert told["code"] == 2 and not told["out"], told
        assert told["err"].startswith(said) and told["err"].count("\n") == 1

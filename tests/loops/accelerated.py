"""Accelerate's own loop over a plain module: `accelerated.py STAGE FOLDER`; on from half way. It leaves told.json."""

import json
import os
import sys
from pathlib import Path

import torch

STAGE, FOLDER = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
import accelerate  # noqa: E402

accelerate.PartialState(backend="gloo")  # on a machine without an accelerator it has to be told how ranks talk
WORLD = int(os.environ["WORLD_SIZE"])
CONFIG = {
    "zero_optimization": {
        "stage": STAGE,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,
    },
    "train_micro_batch_size_per_gpu": 2 // WORLD,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
}  # fmt: skip
plugin = accelerate.DeepSpeedPlugin(hf_ds_config=CONFIG)
accelerator = accelerate.Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2)
accelerate.utils.set_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
plain = model
first = {name: x.clone() for name, x in model.state_dict().items()}
g = torch.Generator().manual_seed(1)
xs, ys = torch.randn(32, 6, generator=g), torch.randn(32, 3, generator=g)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(xs, ys), batch_size=2 // WORLD)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
scheduler = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda i: 1 / (1 + i // WORLD)
)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)


def train(begin, save=None):
    """The losses of the micro-batches from one on."""
    losses = []
    for i, (x, y) in enumerate(loader):
        if i == save:
            accelerator.save_state(FOLDER)
        if i < begin:
            continue
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    return losses


whole = train(0, save=12)
weights = accelerator.get_state_dict(model)
unwrapped = accelerator.unwrap_model(model) is plain
accelerator.load_state(FOLDER)
again = train(12)
if accelerator.is_main_process:
    by_hand = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    by_hand.load_state_dict(first)
    moved, truth = torch.optim.AdamW(by_hand.parameters(), 1e-2), []
    for u in range(8):
        moved.param_groups[0]["lr"] = 1e-2 / (1 + u)
        for j in (4 * u, 4 * u + 2):
            loss = (by_hand(xs[j : j + 2]) - ys[j : j + 2]).square().mean()
            (loss / 2).backward()
            truth.append(loss.item())
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        moved.step()
        moved.zero_grad()
    gap = max((weights[n] - x).abs().max().item() for n, x in by_hand.state_dict().items())
    out = {"whole": whole, "resumed": again, "plain": truth, "gap": gap, "unwrapped": unwrapped}
    Path(FOLDER, "told.json").write_text(json.dumps(out))

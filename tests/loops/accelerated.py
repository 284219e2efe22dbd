"""Accelerate's own loop: `accelerated.py STAGE FOLDER killed|resumed`."""

import os
import sys

import accelerate
import torch
from same import CLIP, PEAK, ROWS, SAVED, UPDATES, Text, die, model, share, tell

STAGE, FOLDER, LIFE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
accelerate.PartialState(backend="gloo")  # on a machine without an accelerator it has to be told how ranks talk
WORLD = int(os.environ["WORLD_SIZE"])
CONFIG = {
    "zero_optimization": {
        "stage": STAGE,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,
    },
    "train_micro_batch_size_per_gpu": ROWS // 2 // WORLD,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": CLIP,
}  # fmt: skip
plugin = accelerate.DeepSpeedPlugin(hf_ds_config=CONFIG)
accelerator = accelerate.Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2)
plain = model()
loader = torch.utils.data.DataLoader(Text(UPDATES * ROWS), batch_size=ROWS // 2 // WORLD)
optimizer = torch.optim.AdamW(plain.parameters(), PEAK, weight_decay=0)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: share(i // WORLD))
trained, optimizer, loader, scheduler = accelerator.prepare(plain, optimizer, loader, scheduler)
losses, first = [], 0
if LIFE == "resumed":
    accelerator.load_state(FOLDER + "/state")
    first, loader = 2 * SAVED, accelerator.skip_first_batches(loader, 2 * SAVED)
for i, batch in enumerate(loader, first):
    if i == 2 * SAVED and LIFE == "killed":
        accelerator.save_state(FOLDER + "/state")
    with accelerator.accumulate(trained):
        loss = trained(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(trained.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    tell(FOLDER, **{LIFE: [sum(pair) / 2 for pair in zip(losses[::2], losses[1::2], strict=False)]})
    if LIFE == "killed" and i == 2 * UPDATES - 2:
        die()
weights, whole = accelerator.get_state_dict(trained), accelerator.unwrap_model(trained)
assert whole is plain
whole.save_pretrained(
    FOLDER + "/final", is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=weights
)

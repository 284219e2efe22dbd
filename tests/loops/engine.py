"""A loop of DeepSpeed's users: `engine.py STAGE FOLDER killed|resumed`."""

import os
import sys

import deepspeed
import torch
from same import CLIP, PEAK, ROWS, SAVED, UPDATES, Text, die, labelled, model, share, tell

STAGE, FOLDER, LIFE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CONFIG = {
    "zero_optimization": {"stage": STAGE, "stage3_gather_16bit_weights_on_model_save": True},
    "train_batch_size": ROWS,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": CLIP,
    "optimizer": {"type": "AdamW", "params": {"lr": PEAK, "weight_decay": 0}},
}
module = model()
engine, optimizer, _, _ = deepspeed.initialize(
    model=module, lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, share), config=CONFIG
)
losses = []
if LIFE == "resumed":
    engine.load_checkpoint(FOLDER)
rows = Text(UPDATES * ROWS).words.split(ROWS // 2 // WORLD)[RANK::WORLD]
for i, words in list(enumerate(rows))[engine.micro_steps :]:
    if i == 2 * SAVED and LIFE == "killed":
        engine.save_checkpoint(FOLDER, client_state={"row": i})
    loss = engine(input_ids=words, labels=labelled(words)).loss
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    deepspeed.comm.all_reduce(mean)
    losses.append(mean.item() / WORLD)
    tell(FOLDER, **{LIFE: [sum(pair) / 2 for pair in zip(losses[::2], losses[1::2], strict=False)]})
    if LIFE == "killed" and i == 2 * UPDATES - 2:
        die()
engine.save_16bit_model(FOLDER + "/final", "model.safetensors")

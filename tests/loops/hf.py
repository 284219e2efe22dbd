"""funczero.hf.Trainer, with dropout: `hf.py STAGE FOLDER alone|killed|resumed`."""

import os
import sys
import time
from pathlib import Path

import torch
from same import die, tell

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

STAGE, FOLDER, LIFE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
WORLD = int(os.environ.get("WORLD_SIZE", "1"))

import hf_trainers  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from funczero.hf import Zero  # noqa: E402
from funczero.testing import tree_hash  # noqa: E402


class Die(TrainerCallback):
    """Within the fifth update."""

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == 4:
            tell(FOLDER, killed=[x["loss"] for x in state.log_history if "loss" in x])
            die()
            time.sleep(60)  # the launcher ends this rank


hf_trainers.world = lambda: WORLD
t = hf_trainers.trainer(
    Zero(STAGE), "gpt2", FOLDER, dropped=True, save_strategy="steps", save_steps=2,
    callbacks=[Die()] if LIFE == "killed" else [],
)  # fmt: skip
t.train(resume_from_checkpoint=LIFE == "resumed" or None)
updates, _ = hf_trainers.numbers(t)
tell(FOLDER, **{LIFE: updates, "hash": tree_hash(dict(t.model.state_dict()))})

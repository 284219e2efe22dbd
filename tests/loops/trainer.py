"""Hugging Face's Trainer, as users write it: `trainer.py STAGE FOLDER [resume]`; -1: no DeepSpeed. Leaves told.json."""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

STAGE, FOLDER, WORLD = int(sys.argv[1]), sys.argv[2], int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)
if WORLD > 1:  # on a machine without an accelerator accelerate has to be told how ranks talk
    import accelerate

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate.PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


class Text(torch.utils.data.Dataset):
    """Rows of random words."""

    def __init__(self, rows):
        self.words = torch.randint(0, 100, (rows, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.words)

    def __getitem__(self, i):
        return {"input_ids": self.words[i], "labels": self.words[i]}


CONFIG = {
    "zero_optimization": {"stage": STAGE, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
}


def made():
    """A trainer of six updates of four rows."""
    arguments = TrainingArguments(
        FOLDER, deepspeed=None if STAGE < 0 else CONFIG, per_device_train_batch_size=2 // WORLD,
        gradient_accumulation_steps=2, max_steps=6, logging_steps=1, learning_rate=1e-2, warmup_steps=2,
        eval_strategy="steps", eval_steps=3, save_steps=3, report_to=[], disable_tqdm=True, max_grad_norm=0.5,
        seed=1, accelerator_config={"use_configured_state": WORLD > 1},
        per_device_eval_batch_size=8 // WORLD, gradient_checkpointing=True,
    )  # fmt: skip
    transformers.set_seed(0)
    small = dict(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=16, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **small))

    return Trainer(model, arguments, train_dataset=Text(64), eval_dataset=Text(16))


def losses(trainer):
    """What was logged at every update, and at every evaluation."""
    kept = "loss", "grad_norm", "eval_loss"
    return [{k: x[k] for k in kept if k in x} for x in trainer.state.log_history if "loss" in x or "eval_loss" in x]


trainer = made()
if sys.argv[3:]:
    trainer.train(resume_from_checkpoint=FOLDER + "/checkpoint-3")
    out = {"resumed": losses(trainer)}
else:
    trainer.train()
    out = {
        "whole": losses(trainer),
        "eval": trainer.evaluate()["eval_loss"],
        "test": trainer.predict(Text(8)).metrics["test_loss"],
    }
    trainer.save_model(FOLDER + "/final")
    words = trainer.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    out["words"] = words.tolist()
if int(os.environ.get("RANK", "0")) == 0:
    Path(FOLDER, "told.json").write_text(json.dumps(out))

"""Hugging Face's Trainer, as users write it: `trainer.py STAGE FOLDER killed|resumed`."""

import os
import sys

import torch
from same import CLIP, PEAK, ROWS, SAVED, UPDATES, Text, die, model, tell
from transformers import Trainer, TrainerCallback, TrainingArguments

STAGE, FOLDER, LIFE, WORLD = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)
if WORLD > 1:  # on a machine without an accelerator accelerate has to be told how ranks talk
    import accelerate

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate.PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]

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


class Note(TrainerCallback):
    """Every line of the log is told at once; a life may end within its last update."""

    def on_log(self, args, state, control, **_):
        kept = "loss", "grad_norm", "eval_loss"
        log = [x for x in state.log_history if "loss" in x or "eval_loss" in x]
        tell(FOLDER, **{LIFE: [{k: x[k] for k in kept if k in x} for x in log]})

    def on_substep_end(self, args, state, control, **_):
        if LIFE == "killed" and state.global_step == UPDATES - 1:
            die()


arguments = TrainingArguments(
    FOLDER, deepspeed=CONFIG, per_device_train_batch_size=ROWS // 2 // WORLD,
    gradient_accumulation_steps=2, max_steps=UPDATES, logging_steps=1, learning_rate=PEAK, warmup_steps=2,
    eval_strategy="steps", eval_steps=SAVED, save_steps=SAVED, report_to=[], disable_tqdm=True, max_grad_norm=CLIP,
    seed=1, accelerator_config={"use_configured_state": WORLD > 1}, train_sampling_strategy="sequential",
    per_device_eval_batch_size=8 // WORLD, gradient_checkpointing=True,
)  # fmt: skip
trainer = Trainer(model(), arguments, train_dataset=Text(UPDATES * ROWS), eval_dataset=Text(16), callbacks=[Note()])
trainer.train(resume_from_checkpoint=f"{FOLDER}/checkpoint-{SAVED}" if LIFE == "resumed" else None)
words = trainer.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
evaluated, tested = trainer.evaluate()["eval_loss"], trainer.predict(Text(8)).metrics["test_loss"]
tell(FOLDER, words=words.tolist(), eval=evaluated, test=tested)
trainer.save_model(FOLDER + "/final")

"""What else users ask of Hugging Face's Trainer: `tuned.py STAGE FOLDER`. Trainers follow each other in one process."""

import os
import sys

import accelerate
import torch
from accelerate.state import AcceleratorState
from same import CLIP, PEAK, ROWS, Text, adapted, model, tell
from transformers import Trainer, TrainerCallback, TrainingArguments

STAGE, FOLDER, WORLD = int(sys.argv[1]), sys.argv[2], int(os.environ["WORLD_SIZE"])
RANK = int(os.environ["RANK"])
torch.set_num_threads(1)
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
accelerate.PartialState(backend="gloo")  # on a machine without an accelerator it has to be told how ranks talk
del os.environ["ACCELERATE_USE_DEEPSPEED"]
AUTO = {
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": STAGE,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
}


def trainer(name, module, rows, callbacks=(), **more):
    """A trainer of updates of four rows in two micro-batches."""
    AcceleratorState._reset_state()  # another plugin than the last trainer's
    arguments = TrainingArguments(
        f"{FOLDER}/{name}", deepspeed=AUTO, per_device_train_batch_size=ROWS // 2 // WORLD, learning_rate=PEAK,
        gradient_accumulation_steps=2, logging_steps=1, report_to=[], disable_tqdm=True, max_grad_norm=CLIP, seed=1,
        accelerator_config={"use_configured_state": True}, train_sampling_strategy="sequential", warmup_steps=2,
        per_device_eval_batch_size=8 // WORLD, **more,
    )  # fmt: skip
    return Trainer(module, arguments, train_dataset=rows, eval_dataset=Text(16), callbacks=list(callbacks))


def told(done):
    """The losses of a trainer's updates."""
    return [x["loss"] for x in done.state.log_history if "loss" in x]


class Stop(TrainerCallback):
    """A callback that counts, and ends the training after six updates."""

    steps = 0

    def on_step_end(self, args, state, control, **_):
        self.steps += 1
        control.should_training_stop = self.steps == 6


stop = Stop()
best = trainer(
    "best", model(), Text(8 * ROWS, uneven=True), [stop], max_steps=8, load_best_model_at_end=True, save_steps=2,
    eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_loss", greater_is_better=True,
)  # fmt: skip
best.train()
evals = [x["eval_loss"] for x in best.state.log_history if "eval_loss" in x]
tell(FOLDER, best=told(best), evals=evals, best_eval=best.evaluate()["eval_loss"], steps=stop.steps)

only = trainer("only", model(), Text(4 * ROWS), max_steps=4, save_only_model=True, save_steps=4)
only.train()
tell(FOLDER, only=told(only))

lora = trainer("lora", adapted(model()), Text(4 * ROWS), max_steps=4, save_steps=2)
lora.train()
lora.save_model(FOLDER + "/adapter")
again = trainer("lora", adapted(model()), Text(4 * ROWS), max_steps=4, save_strategy="no")
again.train(resume_from_checkpoint=FOLDER + "/lora/checkpoint-2")
words = torch.tensor([[5, 6, 7, 8]])
with torch.no_grad():
    logits = lora.model_wrapped(words).logits
    base = lora.model.state_dict()
first = model().state_dict()
still = [n for n in base if n.startswith("base_model.model.") and "lora" not in n]
name = lambda n: n.removeprefix("base_model.model.").replace(".base_layer", "")
tell(
    FOLDER,
    lora=told(lora),
    again=told(again),
    logits=logits.tolist(),
    moved=[n for n in still if not torch.equal(base[n], first[name(n)])],
    still=len(still),
)

prompt, length = torch.tensor([[1, 2, 3]]), 2 + 4 * RANK  # ranks stop at different lengths
told_words = only.model.generate(prompt, max_new_tokens=length, do_sample=False, eos_token_id=None)
both = accelerate.utils.gather_object([told_words.tolist()])
with torch.no_grad():  # all ranks are together again
    only.model_wrapped(words)
tell(FOLDER, generated=both)

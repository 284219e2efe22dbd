"""What does Hugging Face's Trainer cost under funczero at each stage, next to itself under DDP?

Run:
    python experiments/hf_finetune.py                                   # DDP and stages 0 to 3, two processes each
    python experiments/hf_finetune.py --contenders=ddp,3 --steps=60 --rounds=3 --width=512
    python experiments/hf_finetune.py --contenders=ddp,3,hf3                    # and funczero.hf.Trainer at stage 3
    funczero launch --as_deepspeed --num_gpus=2 experiments/hf_finetune.py --contender=3   # one of them

How: this file is the script of a user: a small GPT-2 with random weights over the bytes of Python's own library, a
Trainer, a ds_config. Without --contender it starts itself once for each of them, under torchrun or under `funczero
launch --as_deepspeed`, in rounds, so that noise hits all alike. "hf3" is funczero.hf.Trainer at stage 3, under
torchrun. Time is the median step without the first three, of the fastest round. Memory is the largest resident set of
rank 0 above what it was after the imports. Bits per byte are of held-out text.

Expect:
    The losses of all contenders agree to float32 rounding. Memory falls with the stage. Steps take as long as DDP's.
Found:
    --rounds=1 --steps=12 --length=64, 3,241,472 parameters (12 MiB a copy), two processes, one life each, so times are
    noise (0.56 to 1.05 of DDP's) and are owed from a quiet machine. The second column of memory is with
    MALLOC_MMAP_THRESHOLD_=1048576 in the environment:
               ms a step    MiB    MiB    losses          bits a byte    furthest loss from DDP's
      ddp            212    139    133    5.0178 3.1858        4.9130
      stage 0        221    293    157    5.0178 3.1858        4.9130    1e-7
      stage 1        118    230    152    5.0178 3.1858        4.9130    1e-7
      stage 2        132    214    144    5.0178 3.1858        4.9130    3e-7
      stage 3        213    150    111    5.0178 3.1858        4.9130    3e-7
    Memory falls with the stage, but below stage 3 it is above DDP's by 75 to 154 MiB, of which 11 to 24 are left in the
    second column: the rest is free memory that malloc keeps. An update makes and frees flat buffers of a gradient's
    size, where DDP has its own for ever; once such a buffer was freed, glibc takes those up to 32 MiB from its heap and
    no more by mmap, and what lies behind them keeps the heap long. Counted by a dispatch mode at stage 1, tensors are
    31 MiB between updates where DDP has 50, and 87 at most where DDP has 79; the engine's loop alone shows 181 MiB free
    within malloc, and DDP's 50. The fixed threshold costs time, DDP's too: every buffer is new pages.
    With 25.4 M parameters, whose 97 MiB buffers always go by mmap, tensors are 533 MiB at most at stage 1 where DDP has
    550, and the largest resident set is 620 MiB over the imports where DDP's is 535: a window's sum, what is sent, and
    what arrives are there at once.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

import accelerate
import contenders
import torch
from absl import app, flags
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from funczero.data import corpus

F = flags.FLAGS


class Text(torch.utils.data.Dataset):
    """Row i is the window of a corpus that (0, i) draws; the loss shifts by itself."""

    def __init__(self, text: corpus.Corpus, rows: int, length: int):
        self.text, self.rows, self.length = text, rows, length

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        words = corpus.batch(self.text, 0, i, 1, self.length)["x"][0]
        return {"input_ids": words, "labels": words}


class Clock(TrainerCallback):
    """Seconds between the ends of updates."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Without the first three."""
        return statistics.median(b - a for a, b in zip(self.ends[2:], self.ends[3:]))


def config(stage: int) -> dict[str, Any]:
    """What a user writes into ds_config.json."""
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def trainer_of(run: str) -> tuple[Any, dict[str, Any]]:
    """A contender's Trainer, and what it is given beside."""
    if not run.startswith("hf"):
        return Trainer, {}
    from funczero import hf

    return hf.Trainer, {"zero": hf.Zero(int(run[2:]))}


def most() -> int:
    """The largest resident set of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def contend(run: str) -> dict[str, Any]:
    """Train and evaluate as one rank; what was measured."""
    torch.set_num_threads(1)
    pure, world = run.startswith("hf"), int(os.environ.get("WORLD_SIZE", "1"))
    sharded = run != "ddp" and not pure
    if sharded and not torch.cuda.is_available():  # on a machine without an accelerator: how ranks talk
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        accelerate.PartialState(backend="gloo")
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    before, clock = most(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, deepspeed=config(int(run)) if sharded else None, per_device_train_batch_size=F.rows // 2 // world,
            gradient_accumulation_steps=2, max_steps=F.steps, logging_steps=1, learning_rate=1e-3, warmup_steps=5,
            save_strategy="no", report_to=[], disable_tqdm=True, max_grad_norm=1.0, seed=1, weight_decay=0.1,
            per_device_eval_batch_size=8, train_sampling_strategy="sequential", log_level="error",
            accelerator_config={"use_configured_state": sharded and not torch.cuda.is_available()},
            use_cpu=not sharded and not torch.cuda.is_available(), ddp_find_unused_parameters=False,
        )  # fmt: skip
        set_seed(0)
        shape = dict(n_layer=F.layers, n_embd=F.width, n_head=F.width // 64, vocab_size=256, n_positions=F.length)
        ends = dict(bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shape, **ends))
        size = sum(p.numel() for p in model.parameters())
        train, held = corpus.load()
        rows = Text(train, F.steps * F.rows, F.length), Text(held, 64, F.length)
        made, more = trainer_of(run)
        trainer = made(model, arguments, train_dataset=rows[0], eval_dataset=rows[1], callbacks=[clock], **more)
        assert sharded or world == 1 or arguments.parallel_mode.value == "distributed"
        trainer.train()
        peak = most() - before
        losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        bits = trainer.evaluate()["eval_loss"] / math.log(2)
    return {"losses": losses, "bits": bits, "step": clock.median(), "peak": peak, "size": size}


def launch(name: str) -> list[str]:
    """What starts a contender."""
    zero = [sys.executable, "-m", "funczero.cli", "launch", "--as_deepspeed", f"--num_gpus={F.world}"]
    return contenders.torchrun() if name == "ddp" or name.startswith("hf") else zero


if __name__ == "__main__":
    app.run(lambda _: contenders.run(__file__, contend, launch))

"""Does a GPT train under ZeRO from one command on a bare machine, and does the stage change anything but bytes and
memory?

Run:
    # two processes, ZeRO-3, Python's own library as text
    python experiments/train_gpt.py
    python experiments/train_gpt.py --stage=1 --accumulate=2 --data=my/notes,my/book.txt
    # four processes
    python experiments/train_gpt.py --mesh=node=2,local=2
    # processes that somebody else starts
    torchrun --nproc-per-node=4 experiments/train_gpt.py --stage=2
    # goes on where it was ended, on any number of processes and at any stage
    python experiments/train_gpt.py --save_every=100 --resume=auto
    # batch, precision, stage, optimizer and schedule as DeepSpeed's file says
    python experiments/train_gpt.py --deepspeed_config=ds_config.json
Expect:
    Two minutes on two cores. Held-out bits per byte fall from 8 to well below the entropy of single bytes (4.6), which
    no model without context can pass. The losses of all stages agree to float32 rounding. Bytes sent are the ZeRO
    paper's: stage 3 is 1.5 times stages 0 to 2.
Found:
    2 min 9 s on two cores, stage 3, two processes: held-out bits per byte 8.03 at the start, 2.55 after 200 updates,
    1.896 after 800; single bytes: 4.639. The 800 losses of stage 0 are those of stage 3, bit for bit. 4.59 MB a step
    are sent at stage 3, 3.41 at stage 0: two gathers of all blocks but the last, which stays open from the forward to
    the backward, and a scatter.
    --deepspeed_config, a tiny model on two processes: the losses of fp16 ZeRO-1 and of bf16 ZeRO-2 (4 micro-batches,
    clip, WarmupDecayLR) are unsharded torch's, bit for bit.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the slow imports: ctrl-c ends it without a traceback

import math
from functools import partial

import gpt
import torch
from absl import flags

import funczero as fz
from funczero import P

flags.DEFINE_float("scale_loss", 0.0, "First dynamic loss scale, for float16, such as 65536; 0: none.", lower_bound=0.0)
flags.DEFINE_bool("remat", False, "Save only the blocks' inputs and run each again in the backward: less memory.")
flags.DEFINE_integer("length", 128, "Bytes in a window.", lower_bound=1)
flags.DEFINE_integer("layers", 4, "Blocks of the model.", lower_bound=1)
flags.DEFINE_integer("width", 128, "Features of a token; a multiple of 2 x heads.", lower_bound=2)
flags.DEFINE_integer("heads", 4, "Attention heads of a block.", lower_bound=1)
flags.DEFINE_float("lr", 3e-3, "Peak learning rate of AdamW; a half cosine takes it to a tenth.", lower_bound=0.0)
flags.DEFINE_integer("warmup", 50, "Updates in which the rate rises from 0; at most --steps count.", lower_bound=0)
flags.DEFINE_float("weight_decay", 0.1, "Decay of the matrices an update, in units of the rate.", lower_bound=0.0)
flags.DEFINE_float("clip", 1.0, "Largest norm of the mean gradient; 0: no clipping.", lower_bound=0.0)
flags.DEFINE_multi_string("data", [], "Text files, or folders of .py and .txt files, separated by commas; may be"
                          " repeated. Default: Python's own library.")  # fmt: skip
flags.DEFINE_integer("eval_batches", 8, "Held-out batches of --batch windows, always the same.", lower_bound=1)
flags.DEFINE_integer("sample", 300, "Bytes to sample at the end; 0: none.", lower_bound=0)
flags.DEFINE_string("deepspeed_config", "", "A ds_config.json that says batch, accumulation, precision, stage, clip,"
                    " optimizer and schedule; it replaces the flags for them.")  # fmt: skip


def begin(run: fz.Run) -> fz.Experiment:
    """The step and the data of this command line, in any process."""
    loss_fn = partial(gpt.loss_fn, heads=run.heads, remat=run.remat)
    step = (from_deepspeed if run.deepspeed_config else from_flags)(run, loss_fn)
    train, held_out = fz.data.load([path for text in run.data for path in text.split(",") if path])
    fz.data.batch(held_out, 0, 0, 1, run.length)  # too short a text says so here
    params = gpt.init(run.seed, gpt.Sizes(run.layers, run.width, run.heads))
    held, unigram = step.eval(loss_fn), fz.data.unigram_entropy(held_out)

    def evaluate(state: fz.TrainState) -> dict[str, float]:
        batches = fz.data.sample_batches(held_out, run.eval_batches, run.batch, run.length)
        nats = [held(state, step.local_rows(batch, run.micro_batch)).loss.item() for batch in batches]
        bits = sum(nats) / len(nats) / math.log(2)
        return {"held_out_bits_per_byte": bits, "single_bytes_bits_per_byte": unigram}

    def finish(state: fz.TrainState) -> str:
        whole, draws = step.params(state), torch.Generator().manual_seed(run.seed)
        if not run.sample or run.rank:
            return ""
        return gpt.sample(whole, run.heads, b"def ", run.sample, run.length, 0.8, draws).decode(errors="replace")

    return fz.Experiment(
        step,
        fz.tree.map(lambda x: x.to(step.policy.params), params),
        batch=lambda n: fz.data.batch(train, run.seed, n, run.batch, run.length),
        evaluate=evaluate,
        numbers=lambda m: {"bits_per_byte": m.loss.item() / math.log(2)},
        finish=finish,
        unit="tokens",
        per_row=run.length,
        plot=("bits_per_byte", "held_out_bits_per_byte", "single_bytes_bits_per_byte"),
        about=f"{len(train):,} bytes to train on, {len(held_out):,} held out",
    )


def from_flags(run: fz.Run, loss_fn: partial) -> fz.Step:
    """The step that the flags spell out."""
    lr = fz.schedules.warmup_cosine(run.lr, min(run.warmup, run.steps), run.steps, end=run.lr / 10)
    scale = [fz.scale_loss(run.scale_loss)] if run.scale_loss else []
    clip = [fz.clip_by_global_norm(run.clip)] if run.clip else []
    adamw = fz.adamw(lr, b1=0.9, b2=0.95, weight_decay=[("norm", 0.0), ("", run.weight_decay)])
    return run.train_step(fz.value_and_grad(loss_fn, batch=P(run.axis), units=("blocks",)), *scale, *clip, adamw)


def from_deepspeed(run: fz.Run, loss_fn: partial) -> fz.Step:
    """The step that --deepspeed_config describes."""
    said = ("stage", "policy", "scale_loss", "accumulate", "micro_batch", "sums", "batch", "lr", "warmup")
    run.instead("deepspeed_config", **dict.fromkeys((*said, "weight_decay", "clip")))  # no flag may say it, too
    chain, config = fz.from_deepspeed(run.deepspeed_config, loss_fn, world=run.world, axis=run.axis, units=("blocks",))
    stage, (rows, _, steps) = config.value("zero_optimization.stage"), config.triad
    run.instead("deepspeed_config", stage=stage, accumulate=steps, batch=rows)
    return fz.donate(fz.train_step(*chain, **config.arguments | {"mesh": run.mesh}))


if __name__ == "__main__":
    fz.experiment(begin, rows="windows", steps=800, batch=16, eval_every=200)

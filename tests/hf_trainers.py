"""What funczero.hf.Trainer and the stock one train: tiny models of random weights on Python's own library, as bytes."""

from __future__ import annotations

import multiprocessing
import tempfile
from functools import cache

import torch
import torch.distributed as dist

from funczero.data import corpus
from funczero.testing import tree_hash

ROWS, PEAK, CLIP = 2, 1e-2, 0.5  # rows of a micro-batch
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


text = cache(corpus.load)


def workers():
    """Of a loader: none where a process may have no children, which changes no row."""
    return 0 if multiprocessing.current_process().daemon else 2


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def model(kind, dropped=False):
    """The same weights at every call."""
    import transformers as t

    p = 0.1 if dropped else 0.0
    torch.manual_seed(0)
    if kind == "gpt2":  # its head is tied to its embedding
        shape = dict(n_layer=2, n_embd=16, n_head=2, vocab_size=256, n_positions=24, bos_token_id=1, eos_token_id=2)
        return t.GPT2LMHeadModel(t.GPT2Config(resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, **shape))
    if kind == "bert":
        more = dict(vocab_size=256, max_position_embeddings=24, num_labels=3)
        drop = dict(hidden_dropout_prob=p, attention_probs_dropout_prob=p)
        return t.BertForSequenceClassification(t.BertConfig(**SMALL, **more, **drop))
    if kind == "resnet":
        shape = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
        return t.ResNetForImageClassification(t.ResNetConfig(**shape))
    shape = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=256, decoder_start_token_id=0)
    return t.T5ForConditionalGeneration(t.T5Config(dropout_rate=p, pad_token_id=0, **shape))


class Text(torch.utils.data.Dataset):
    """Row i is a window of a corpus, of 6 to 17 bytes; a class is what its first byte is."""

    def __init__(self, rows, kind="gpt2", held=False):
        self.text, self.rows, self.kind = text()[held], rows, kind

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        if i >= self.rows:
            raise IndexError(i)
        words = corpus.batch(self.text, 3, i, 1, 6 + 5 * i % 12)["x"][0]
        if self.kind == "resnet":
            seen = corpus.batch(self.text, 3, i, 1, 3 * 16 * 16)["x"].view(3, 16, 16) / 128 - 1
            return {"pixel_values": seen, "labels": int(words[0]) % 3}
        if self.kind == "bert":
            return {"input_ids": words, "labels": int(words[0]) % 3}
        return {"input_ids": words, "labels": words}


def collate(rows):
    """Padded to the longest of a micro-batch."""
    if "pixel_values" in rows[0]:
        return torch.utils.data.default_collate(rows)
    pad = lambda name, x: torch.nn.utils.rnn.pad_sequence([r[name] for r in rows], batch_first=True, padding_value=x)
    mask = [torch.ones_like(r["input_ids"]) for r in rows]
    out = {"input_ids": pad("input_ids", 0), "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)}
    labels = torch.tensor([r["labels"] for r in rows]) if isinstance(rows[0]["labels"], int) else pad("labels", -100)
    return out | {"labels": labels}


def arguments(folder, micros=4, **more):
    """Of updates of so many micro-batches on all ranks."""
    from transformers import TrainingArguments

    say = dict(
        use_cpu=True, per_device_train_batch_size=ROWS, gradient_accumulation_steps=micros // world(),
        logging_steps=1, learning_rate=PEAK, warmup_steps=2, report_to=[], disable_tqdm=True, max_grad_norm=CLIP,
        weight_decay=0.1, save_strategy="no", per_device_eval_batch_size=3, seed=1, num_train_epochs=2,
        remove_unused_columns=False,
    )  # fmt: skip
    return TrainingArguments(str(folder), **{**say, **more})


def trainer(zero, kind, folder, rows=18, dropped=False, cls=None, callbacks=(), made=None, given=(), **more):
    """Ours, or with zero=None the stock one, quiet."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if cls is None:
        from funczero.hf import Trainer as cls

        if zero is None:
            cls = transformers.Trainer
    say = {"train_dataset": Text(rows, kind), "eval_dataset": Text(10, kind, held=True), "data_collator": collate}
    say |= {} if zero is None else {"zero": zero}
    made = model(kind, dropped) if made is None else made
    t = cls(made, arguments(folder, **more), callbacks=list(callbacks), **{**say, **dict(given)})
    t.remove_callback(transformers.PrinterCallback)
    return t


def numbers(t):
    """Of every update: loss, norm, rate, epoch; and of every evaluation its loss."""
    kept = ("loss", "grad_norm", "learning_rate", "epoch")
    log = t.state.log_history
    return [[x[k] for k in kept] for x in log if "loss" in x], [x["eval_loss"] for x in log if "eval_loss" in x]


def predicted(t, kind):
    """Some of what is predicted of every row; and means over its dim 1, which padding by another rank would move."""
    parts = []
    for t.preprocess_logits_for_metrics in (None, lambda x, labels: (x[0] if isinstance(x, tuple) else x).mean(1)):
        found = t.predict(Text(7, kind, held=True)).predictions
        found = found[0] if isinstance(found, tuple) else found
        parts.append(torch.from_numpy(found.reshape(len(found), -1)[:, :4].copy()))
    return torch.cat(parts, 1)


def fit(zero, kind="gpt2", folder=None, dropped=False, rows=18, resume=None, **more):
    """What a training says, and the hash of what it leaves."""
    with tempfile.TemporaryDirectory() as own:
        t = trainer(zero, kind, folder or own, rows, dropped, **more)
        t.train(resume_from_checkpoint=resume)
        updates, evals = numbers(t)
        return {
            "updates": updates,
            "evals": evals,
            "eval": t.evaluate()["eval_loss"],
            "predicted": predicted(t, kind),
            "hash": tree_hash(dict(t.model.state_dict())),
            "weights": {n: x.detach().clone() for n, x in t.model.state_dict().items()},
        }


# --- other ways to use it ---------------------------------------------------------------------------------------------
class Events:
    """Every call of a callback, by name and update."""

    def __new__(cls, told):
        import transformers

        names = [n for n in dir(transformers.TrainerCallback) if n.startswith("on_")]

        def noting(name):
            def note(self, args, state, control, **more):
                told.append((name, state.global_step, sorted(k for k, x in more.items() if x is not None)))

            return note

        return type("Noted", (transformers.TrainerCallback,), {n: noting(n) for n in names})()


def dull(rows):
    """As `collate`; in some micro-batches there is nothing to predict."""
    out = collate(rows)
    if int(rows[0]["input_ids"].sum()) % 2:
        out["labels"][:] = -100
    return out


def ways(name, zero):
    """What a way to use a Trainer changes: arguments of `trainer`, for ours or (zero=None) for the stock one."""
    import transformers

    from funczero.hf import Trainer

    base = transformers.Trainer if zero is None else Trainer
    if name == "own loss":

        class Own(base):
            loss_is_scaled_for_ga = False

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                labels = inputs.pop("labels")
                out = model(**inputs)
                found = torch.nn.functional.cross_entropy(out.logits.float().flatten(0, -2), labels.flatten())
                return (found, out) if return_outputs else found

        return {"cls": Own}
    if name == "loss function":

        def weighed(outputs, labels, num_items_in_batch=None):
            found = torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            return found / (num_items_in_batch or labels[:, 1:].ne(-100).sum())

        return {"given": {"compute_loss_func": weighed}}
    if name == "no items":  # in some updates
        return {"given": {"data_collator": dull}}
    if name == "smoothed":
        return {"label_smoothing_factor": 0.1}
    if name == "checkpointing":
        return {"gradient_checkpointing": True}
    if name == "workers":
        return {"dataloader_num_workers": workers(), "train_sampling_strategy": "sequential", "max_steps": 3}
    if name == "adapters":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        small = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        return {"made": get_peft_model(model("gpt2"), small)}
    if name in ("adafactor", "sgd", "adagrad", "rmsprop"):
        return {"optim": name, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    if name == "torch's":
        made = model("gpt2")
        o = torch.optim.NAdam(made.parameters(), lr=1e-3, weight_decay=0.1)
        given = {"optimizers": (o, torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)))}
        return {"made": made, "given": given}
    return {}


def beside(name, zero=None):
    """What a training says in one of these ways."""
    kind = "t5" if name == "adafactor" else "gpt2"  # it makes as much of a gradient that is rounding as of others
    return fit(zero, kind, **ways(name, zero))


def fits(zero, kind, more):
    """A training without dropout, and the hash of one with it."""
    return {"quiet": fit(zero, kind, **more), "dropped": fit(zero, kind, dropped=True)["hash"]}


def saved(zero, folder):
    """What a training with checkpoints, evaluations and the best model at its end says and leaves."""
    from pathlib import Path

    events = []
    t = trainer(
        zero, "gpt2", folder, callbacks=[Events(events)], save_strategy="steps", eval_strategy="steps", save_steps=2,
        eval_steps=2, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True, include_num_input_tokens_seen="non_padding", max_steps=6,
    )  # fmt: skip
    t.train()
    updates, evals = numbers(t)
    return {
        "events": events,
        "updates": updates,
        "evals": [*evals, t.evaluate()["eval_loss"]],
        "best": t.state.best_model_checkpoint,
        "kept": sorted(p.name for p in Path(folder).glob("checkpoint-*")),
    }


PAGE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"},
}
AUTO = {
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
}


class Stream(torch.utils.data.IterableDataset):
    """Rows that nobody knows the number of."""

    def __iter__(self):
        rows = Text(18)
        return (rows[i] for i in range(18))


def random_words(rows):
    """As `collate`, with bytes that are drawn."""
    out = collate(rows)
    out["input_ids"] = torch.where(torch.rand(out["input_ids"].shape) < 0.2, 7, out["input_ids"])
    return out


def more(folder):
    """What has no stock Trainer beside it on a CPU: hashes that do not know how many ranks there were, and the rest."""
    import transformers

    import funczero as fz
    from funczero.hf import Zero

    class Break(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            control.should_epoch_stop = state.global_step == 1 and state.epoch < 1
            state.epoch = max(state.epoch, float(control.should_epoch_stop))

    class Look(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, **_):
            for average in (False, True):
                with t.whole(average) as module:
                    looks.append(tree_hash(dict(module.state_dict())))
            t.save_model(folder + "/kept")

    out, hashes, looks = {}, [], []
    for name, zero, say in (
        ("bf16", Zero(3), {"bf16": True}),
        ("half", Zero(2), {"fp16": True}),
        ("page", PAGE, {}),
        ("stream", Zero(3), {"given": {"train_dataset": Stream()}, "max_steps": 6}),
        ("by length", Zero(2), {"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True}),
        ("statistics", Zero(3), {"kind": "resnet", "micros": 2}),
        ("noisy", Zero(3), {"neftune_noise_alpha": 5}),
        ("drawn", Zero(1), {"given": {"data_collator": random_words}, "dataloader_num_workers": workers()}),
    ):
        found = fit(zero, **{"dropped": True, **say})
        hashes.append((name, found["hash"]))
        out[name] = found["updates"]
    out["hashes"] = hashes
    out["bf16"] = fit(Zero(3), bf16=True)["updates"]
    out["config"] = [x for row in fit(PAGE | AUTO)["updates"] for x in row[:3]]
    out["wires"] = fit(Zero(3, weights=fz.int8(64), gradients=fz.int8(64)))["updates"]
    t = trainer(Zero(2, ema=0.5, give_back=False), "gpt2", folder, callbacks=[Look()])
    t.train()
    t.accelerator.wait_for_everyone()  # rank 0 has written
    kept = transformers.GPT2LMHeadModel.from_pretrained(folder + "/kept")
    saved = tree_hash(dict(kept.state_dict()))
    out["averaged"] = looks[0] == saved and looks[1] != saved and 4 < t.evaluate()["eval_loss"] < 5
    b = trainer(Zero(2), "gpt2", folder, callbacks=[Break()])
    b.train()
    out["broken"] = b.state.global_step
    return out


def on_meta(folder):
    """The hash of a training, that of its second half by a model on meta, and what such a model is told without it."""
    from funczero.hf import Zero

    def empty():
        made = model("gpt2")
        with torch.device("meta"):
            return type(made)(made.config)

    first = trainer(Zero(2), "gpt2", folder, save_strategy="steps", save_steps=2, max_steps=4)
    first.train()
    again = trainer(Zero(3), "gpt2", folder, made=empty(), max_steps=4)
    again.train(resume_from_checkpoint=folder + "/checkpoint-2")
    assert again.model.lm_head.weight is again.model.transformer.wte.weight
    hashes = [tree_hash(dict(t.model.state_dict())) for t in (first, again)]
    return *hashes, _error(trainer(Zero(), "gpt2", folder, made=empty()).train)


def refused(folder):
    """By what was asked: what its refusal should say, and what it says."""
    import transformers

    import funczero as fz
    from funczero.hf import Trainer, Zero
    from funczero.hf.refusals import check_version

    class Mine(torch.optim.SGD):
        pass

    class Steps(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

    class Dealt(Trainer):
        def get_train_dataloader(self):
            rows = torch.utils.data.DistributedSampler(self.train_dataset, 1, 0)
            return torch.utils.data.DataLoader(self.train_dataset, ROWS, sampler=rows, collate_fn=collate)

    class Vector(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits[:, 0, 0]

    def given(optimizer=None, scheduler=None):
        made = model("gpt2")
        o = (optimizer or torch.optim.AdamW)(made.parameters())
        return {"made": made, "given": {"optimizers": (o, scheduler and scheduler(o))}}

    unlabelled = lambda rows: {k: x for k, x in collate(rows).items() if k != "labels"}
    said = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()
    plateau = {"eval_strategy": "epoch", "metric_for_best_model": "eval_loss"}
    asked = {
        "stage": ("stage=4 does not exist; write 0, 1, 2 or 3", Zero(4), {}),
        "nodes": ("hpz=2 does not cut 1 ranks into nodes", Zero(3, hpz=2), {}),
        "made already": ("write optimizer=lambda lr: fz.adamw(lr)", Zero(optimizer=fz.adamw(0.1)), {}),
        "two chains": ("weights= is written beside chain=", Zero(chain=fz.mics, weights=fz.int8(64)), {}),
        "compiled": ("torch_compile=True): a compiled model would be", Zero(), {"torch_compile": True}),
        "sizes": ("another batch size is another training", Zero(), {"auto_find_batch_size": True}),
        "metrics": ("batch_eval_metrics=True): metrics are computed once", Zero(), {"batch_eval_metrics": True}),
        "dealing": ("deals rows among ranks by itself; write", Zero(), {"train_sampling_strategy": "batch_rebalance"}),
        "plateau": ("a ReduceLROnPlateau, but a rate", Zero(), {"lr_scheduler_type": "reduce_lr_on_plateau"} | plateau),
        "steps": ("Steps.training_step is overridden, but this loop does not call it", Zero(), {"cls": Steps}),
        "dealt": ("by itself (DistributedSampler), and the Trainer would deal its part again", Zero(), {"cls": Dealt}),
        "vector": ("compute_loss returned a tensor of shape (2,); return one number", Zero(), {"cls": Vector}),
        "mine": ("nothing here knows how hf_trainers.Mine moves a parameter", Zero(), given(Mine)),
        "no rate": ("the Adafactor has no learning rate (lr=None)", Zero(), given(transformers.Adafactor)),
        "hessian": ("torch.optim.LBFGS cannot work here", Zero(), given(torch.optim.LBFGS)),
        "steps down": (
            "the schedule is a StepLR, but a rate here", Zero(),
            given(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1)),
        ),
        "labels": (
            "write loss_is_scaled_for_ga = False, and return a mean", Zero(),
            {"given": {"compute_loss_func": said, "data_collator": unlabelled}},
        ),
        "clip": ('gradient_clipping=0.1 where the arguments say 0.5; write "auto"', {"gradient_clipping": 0.1}, {}),
        "scheduler": (
            "scheduler: a scheduler without an optimizer",
            {"train_micro_batch_size_per_gpu": 2, "scheduler": AUTO["scheduler"]}, {},
        ),
        "best": (
            "load_best_model_at_end with Zero(give_back=False)", Zero(give_back=False),
            plateau | {"load_best_model_at_end": True, "save_strategy": "epoch"},
        ),
    }  # fmt: skip
    found = {}
    for name, (words, zero, say) in asked.items():
        found[name] = words, _error(lambda: trainer(zero, "gpt2", folder, **say).train())  # noqa: B023
    found["version"] = "has no Trainer._build_accelerator_args, which this class builds on", _error(
        lambda: check_version(type("Old", (), {}))
    )
    done = trainer(Zero(), "gpt2", folder, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    done.train()
    found["again"] = "this Trainer has trained, and its moments are gone; make a new one", _error(done.train)
    at = f"{folder}/checkpoint-1"
    found["weights alone"] = "holds no state of a chain (it was written by another Trainer, or with", _error(
        lambda: trainer(Zero(), "gpt2", folder).train(resume_from_checkpoint=at)
    )
    import os

    os.remove(at + "/trainer_state.json")
    found["half"] = "has no trainer_state.json, so it is no checkpoint, or one that was not finished", _error(
        lambda: trainer(Zero(), "gpt2", folder).train(resume_from_checkpoint=at)
    )
    found["none"] = "there is no finished checkpoint in", _error(
        lambda: trainer(Zero(), "gpt2", folder).train(resume_from_checkpoint=True)
    )
    assert transformers.__version__
    return found


def _error(fn):
    try:
        fn()
    except (ValueError, TypeError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"
    return "it went through"

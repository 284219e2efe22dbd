"""What funczero.hf.Trainer and the stock one train: tiny models of random weights on Python's own library, as bytes."""

from __future__ import annotations

import tempfile
from functools import cache

import torch
import torch.distributed as dist

from funczero.data import corpus
from funczero.testing import tree_hash

ROWS, PEAK, CLIP = 2, 1e-2, 0.5  # rows of a micro-batch
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


text = cache(corpus.load)


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
    shape = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=256, decoder_start_token_id=0)
    return t.T5ForConditionalGeneration(t.T5Config(dropout_rate=p, pad_token_id=0, **shape))


class Text(torch.utils.data.Dataset):
    """Row i is a window of a corpus, of 6 to 17 bytes; a class is what its first byte is."""

    def __init__(self, rows, kind="gpt2", held=False):
        self.text, self.rows, self.kind = text()[held], rows, kind

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        words = corpus.batch(self.text, 3, i, 1, 6 + 5 * i % 12)["x"][0]
        if self.kind == "bert":
            return {"input_ids": words, "labels": int(words[0]) % 3}
        return {"input_ids": words, "labels": words}


def collate(rows):
    """Padded to the longest of a micro-batch."""
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
    t = cls(
        model(kind, dropped) if made is None else made, arguments(folder, **more), train_dataset=Text(rows, kind),
        eval_dataset=Text(10, kind, held=True), data_collator=collate, callbacks=list(callbacks),
        **({} if zero is None else {"zero": zero}), **dict(given),
    )  # fmt: skip
    t.remove_callback(transformers.PrinterCallback)
    return t


def numbers(t):
    """Of every update: loss, norm, rate, epoch; and of every evaluation its loss."""
    kept = ("loss", "grad_norm", "learning_rate", "epoch")
    log = t.state.log_history
    return [[x[k] for k in kept] for x in log if "loss" in x], [x["eval_loss"] for x in log if "eval_loss" in x]


def predicted(t, kind):
    """Some of what is predicted of every row."""
    found = t.predict(Text(7, kind, held=True)).predictions
    found = found[0] if isinstance(found, tuple) else found
    return torch.from_numpy(found.reshape(len(found), -1)[:, :4].copy())


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

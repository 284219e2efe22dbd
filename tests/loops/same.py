"""What all loops train: a small GPT-2, rows of words, a rate that rises and falls; and plain torch by hand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

UPDATES, ROWS, SAVED, PEAK, CLIP = 8, 4, 4, 1e-2, 0.5


def model() -> GPT2LMHeadModel:
    """The same weights at every call."""
    torch.manual_seed(0)
    small = dict(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=16, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **small))


class Text(torch.utils.data.Dataset):
    """Rows of random words.

    Args:
      uneven: row i is told to predict its last 1 + 5 i % 11 words alone.
    """

    def __init__(self, rows: int, uneven: bool = False):
        self.words = torch.randint(0, 100, (rows, 12), generator=torch.Generator().manual_seed(0))
        self.labels = labelled(self.words)
        for i in range(rows if uneven else 0):
            self.labels[i, : 11 - 5 * i % 11] = -100

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[i], "labels": self.labels[i]}


def labelled(words: torch.Tensor) -> torch.Tensor:
    """Labels as they are counted by Hugging Face: nothing predicts the first word."""
    return torch.cat([torch.full_like(words[..., :1], -100), words[..., 1:]], -1)


def share(update: int) -> float:
    """Of the peak rate: Hugging Face's linear schedule with two updates of warmup."""
    return update / 2 if update < 2 else (UPDATES - update) / (UPDATES - 2)


def updates(module: Any, text: Text, shares: list[float]) -> Iterator[tuple[float, float]]:
    """Plain torch's loss and norm of update after update: the mean over all words of its rows."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], PEAK, weight_decay=0)
    for words, labels, part in zip(text.words.split(ROWS), text.labels.split(ROWS), shares, strict=False):
        optimizer.param_groups[0]["lr"] = PEAK * part
        loss = module(words, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), norm.item()


def by_hand() -> dict[str, Any]:
    """Plain torch in float64: what all loops have to tell."""
    trained = model().double()
    mean = lambda rows: trained(Text(rows).words, labels=Text(rows).words).loss.item()
    losses, norms, evals = [], [], []
    for loss, norm in updates(trained, Text(UPDATES * ROWS), list(map(share, range(UPDATES)))):
        losses.append(loss)
        norms.append(norm)
        if len(losses) % SAVED == 0:
            evals.append(mean(16))
    words = trained.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).tolist()
    return {"losses": losses, "norms": norms, "evals": evals, "test": mean(8), "words": words, "trained": trained}


def tell(folder: str, **what: Any) -> None:
    """What a life has to say, by rank 0, after what it said before."""
    if int(os.environ.get("RANK", "0")) == 0:
        path = Path(folder, "told.json")
        before = json.loads(path.read_text()) if path.exists() else {}
        Path(folder).mkdir(exist_ok=True)
        path.write_text(json.dumps(before | what))


def die() -> None:
    """Rank 0 is killed here; the launcher ends the others."""
    if int(os.environ.get("RANK", "0")) == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def adapted(module: GPT2LMHeadModel) -> Any:
    """The same adapters at every call."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return get_peft_model(module, adapters)

"""A checkpoint's folder: the stock Trainer's files, and the sharded state beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)
STATE, SCHEDULER = "trainer_state.json", "scheduler.pt"  # the first is written last


def last_whole(folder: str) -> str:
    """The last checkpoint of a folder that was finished; the others are said.

    Raises:
      ValueError: there is none.
    """
    found = [p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        if (path / STATE).is_file():
            return str(path)
        logger.warning("hf.Trainer: %s was not finished, and an earlier checkpoint is taken", path)
    raise ValueError(f"hf.Trainer: there is no finished checkpoint in {folder!r} to resume from")


def check_finished(folder: str) -> None:
    """Refuse a checkpoint that was not finished.

    Raises:
      ValueError: it has no trainer_state.json.
    """
    if not Path(folder, STATE).is_file():
        why = f"has no {STATE}, so it is no checkpoint, or one that was not finished"
        raise ValueError(f"hf.Trainer: {folder!r} {why}; resume from an earlier one")


def unfinished(folder: str) -> None:
    """A folder that is written into again is no finished checkpoint until it is."""
    Path(folder, STATE).unlink(missing_ok=True)


def put_schedule(folder: str, scheduler: Any, optimizer: Any, updates: int) -> None:
    """The schedule that is shown, as it was after so many applied updates."""
    path = Path(folder, SCHEDULER)
    if path.is_file():
        scheduler.load_state_dict(torch.load(path, weights_only=True))
    if scheduler.last_epoch != updates:
        scheduler.last_epoch = updates - 1
        advance(scheduler)
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def advance(scheduler: Any) -> None:
    """The schedule that is shown after one more applied update; its optimizer, which torch looks for, moves nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()

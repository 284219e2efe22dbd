"""Hugging Face's Trainer whose training step is a pure chain: `funczero.hf.Trainer(model, args, ..., zero=Zero(3))`."""

from funczero.hf.trainer import Trainer as Trainer
from funczero.hf.zero import Zero as Zero

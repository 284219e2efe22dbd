"""Which form of a kernel runs on a device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache
from types import ModuleType

import torch

from funczero.kernels import native

NAMES = ("adamw", "block_quantise", "grid", "hadamard")
FORMS = {"cpu": "cpu", "cuda": "gpu"}  # by a device's type; torch calls ROCm cuda too


def kernel(name: str, device: torch.device) -> ModuleType:
    """The fastest form of a kernel that has shown the reference's bits on this device; the reference where none has.

    Law: every form has the reference's functions. The first use on a device runs small cases both ways; a form that
    differs in one bit is told by name and not used. FUNCZERO_KERNELS=reference takes the reference everywhere.

    Args:
      name: "adamw", "block_quantise", "grid" or "hadamard".
      device: where the tensors lie.

    Raises:
      ValueError: no such kernel, or another word in FUNCZERO_KERNELS.

    >>> kernel("hadamard", torch.device("meta")).__name__
    'funczero.kernels.hadamard.reference'
    """
    if name not in NAMES:
        raise ValueError(f"kernel: {name!r} does not exist; write one of {list(NAMES)}")
    chosen = os.environ.get("FUNCZERO_KERNELS", "")
    if chosen not in ("", "auto", "reference"):
        raise ValueError(f"FUNCZERO_KERNELS={chosen!r} does not exist; write 'reference', or 'auto' for the fastest")
    if chosen == "reference" or device.type not in FORMS:
        return _module(name, "reference")
    return _proved(name, device)


def used(name: str, device: torch.device) -> str:
    """What runs there, in a word: "cpu", "gpu" or "reference"."""
    return kernel(name, device).__name__.rsplit(".", 1)[1]


def _module(name: str, form: str) -> ModuleType:
    return importlib.import_module(f"funczero.kernels.{name}.{form}")


@lru_cache(maxsize=64)
def _proved(name: str, device: torch.device) -> ModuleType:
    reference = _module(name, "reference")
    try:
        fast = _there(name, device)
        why = None if fast is None else _module(name, "trial").differs(fast, device)
    except Exception as e:  # a form that fails on this machine, however it fails, must not end a run
        fast, why = None, f"it failed with {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    if why:
        native.say(name, f"on {device} its fast form does not give the same bits: {why}")
    return reference if fast is None or why else fast


def _there(name: str, device: torch.device) -> ModuleType | None:
    if device.type == "cpu":
        return None if native.library(name) is None else _module(name, "cpu")
    if importlib.util.find_spec("triton") is None:
        native.say(name, "triton is not installed; install it")
        return None
    return _module(name, "gpu")

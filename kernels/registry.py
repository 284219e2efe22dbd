"""Which form of a kernel runs on a device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache
from types import ModuleType

import torch
from absl import logging

from funczero.kernels import native

NAMES = ("adamw", "block_quantise", "crc32c", "grid", "hadamard", "squares")
FORMS = {"cpu": "cpu", "cuda": "gpu"}  # by a device's type; torch calls ROCm cuda too
WORDS = ("auto", "bounded", "reference")


def kernel(name: str, device: torch.device) -> ModuleType:
    """The fastest form of a kernel that has shown the reference's bits on this device; the reference where none has.

    Law: every form has the reference's functions. The first use on a device runs small cases both ways; a form that
    differs in one bit is told by name and not used. FUNCZERO_KERNELS=reference takes the reference everywhere;
    "bounded" also takes forms that state a bound (BOUND) in place of equal bits, and says so.

    Args:
      name: "adamw", "block_quantise", "crc32c", "grid", "hadamard" or "squares".
      device: where the tensors lie.

    Raises:
      ValueError: no such kernel, or another word in FUNCZERO_KERNELS.

    >>> kernel("hadamard", torch.device("meta")).__name__
    'funczero.kernels.hadamard.reference'
    """
    if name not in NAMES:
        raise ValueError(f"kernel: {name!r} does not exist; write one of {list(NAMES)}")
    chosen = os.environ.get("FUNCZERO_KERNELS", "auto")
    if chosen not in WORDS:
        raise ValueError(f"FUNCZERO_KERNELS={chosen!r} does not exist; write one of {list(WORDS)}")
    if chosen == "reference" or device.type not in FORMS:
        return _module(name, "reference")
    return _proved(name, device, chosen == "bounded")


def used(name: str, device: torch.device) -> str:
    """What runs there, in a word: "cpu", "gpu" or "reference".

    >>> used("grid", torch.device("meta"))
    'reference'
    """
    return kernel(name, device).__name__.rsplit(".", 1)[1]


def _module(name: str, form: str) -> ModuleType:
    return importlib.import_module(f"funczero.kernels.{name}.{form}")


@lru_cache(maxsize=64)
def _proved(name: str, device: torch.device, bounded: bool) -> ModuleType:
    reference = _module(name, "reference")
    try:
        fast = _there(name, device)
        if fast is None:
            return reference
        if hasattr(fast, "BOUND"):
            if bounded:
                logging.warning("kernels: %s on %s has not its reference's bits, but %s", name, device, fast.BOUND)
            return fast if bounded else reference
        why = _module(name, "trial").differs(fast, device)
    except Exception as e:  # a form that fails on this machine, however it fails, must not end a run
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        native.say(name, f"its fast form fails on {device} with {why}")
        return reference
    if why:
        native.say(name, f"its fast form has other bits on {device}: {why}")
    return reference if why else fast


def _there(name: str, device: torch.device) -> ModuleType | None:
    """The fast form, where what it needs is there."""
    if device.type == "cpu":
        return None if native.library(name) is None else _module(name, "cpu")
    if importlib.util.find_spec(f"funczero.kernels.{name}.gpu") is None:
        return None  # the reference's operations are all there is
    if importlib.util.find_spec("triton") is None:
        native.say(name, f"on {device} it needs triton, which is not installed")
        return None
    return _module(name, "gpu")

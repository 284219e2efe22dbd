"""Kernels that have shown their bits on the CPU: what is forked from a process that imports this need not try them.

A pool's server does so with `WorkerPool(size, preload=("funczero.testing.proven",))`.
"""

from __future__ import annotations

import torch

from funczero.kernels.registry import NAMES, used

FORMS = {name: used(name, torch.device("cpu")) for name in NAMES}  # what each of them runs as, "cpu" or "reference"

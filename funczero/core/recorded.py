"""Is a function being recorded, on tensors without values?"""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def recording() -> bool:
    """Does every operation go into a graph, and none compute? Then no value can decide anything.

    >>> recording()
    False
    """
    fake = torch._C._TorchDispatchModeKey.FAKE
    return get_proxy_mode() is not None and torch._C._get_dispatch_mode(fake) is not None

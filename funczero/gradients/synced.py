"""Batch norm whose statistics are those of all ranks' rows: `nn.SyncBatchNorm`, on any device, by what can be
differentiated any number of times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funczero.comm.adjoint import total, vary
from funczero.comm.differentiable import over_all
from funczero.layout.mesh import Mesh


class Across(NamedTuple):
    """The ranks that have rows of one batch."""

    mesh: Mesh
    axes: tuple[str, ...]

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a value of each rank, about to meet values of this rank again; added in the tree over ranks."""
        return over_all(over_all(x, self.axes, self.mesh, total), self.axes, self.mesh, vary)


def is_synced(module: nn.Module) -> bool:
    """Is there a layer that takes statistics over ranks?"""
    return any(isinstance(m, nn.SyncBatchNorm) and m.training for m in module.modules())


def normed(layer: nn.SyncBatchNorm, across: Across | None, x: Tensor) -> Tensor:
    """The layer's forward: [rows, channels, ...] -> the same, by the mean and variance of all ranks' rows.

    Values are those of batch norm over the rows of all ranks, and so are the running statistics that it leaves. It
    returns x's dtype; sums and the count are float32 at least, since a half-precision count ends at 65,504.
    """
    if not layer.training:
        still = layer.running_mean is None
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, still, 0.0, layer.eps)
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    dims, channels = [0, *range(2, x.dim())], x.shape[1]
    everywhere = across.sum if across is not None else lambda t: t
    count = x.new_full((1,), x.numel() / max(channels, 1))
    sums = everywhere(torch.cat([x.sum(dims), count]))
    n, shape = sums[-1], (1, channels, *[1] * (x.dim() - 2))
    away = x - (sums[:-1] / n).view(shape)
    var = everywhere((away * away).sum(dims)) / n
    if layer.running_mean is not None and layer.running_var is not None:
        _follow(layer, sums[:-1].detach() / n.detach(), var.detach() * (n / (n - 1).clamp(min=1)).detach())
    out = away * (var + layer.eps).rsqrt().view(shape)
    if layer.weight is not None:
        out = out * layer.weight.view(shape) + layer.bias.view(shape)
    return out.to(dtype)


def _follow(layer: nn.SyncBatchNorm, mean: Tensor, var: Tensor) -> None:
    """Running statistics and their count, as torch's layer moves them."""
    assert layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    part = 1 / layer.num_batches_tracked.double() if layer.momentum is None else layer.momentum
    for running, new in ((layer.running_mean, mean), (layer.running_var, var)):
        running.copy_((1 - part) * running + part * new)

"""AdamW and Adam in C++, with the bits of torch's fused kernel: gradients are not written, and a skipped update reads
nothing.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from funczero.kernels import native
from funczero.kernels.adamw import reference
from funczero.kernels.adamw.reference import Rates


class _Leaf(ctypes.Structure):
    """One leaf, as adamw.cpp has it."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("param", "grad", "mu", "nu")), ("n", ctypes.c_int64))


class _Call(ctypes.Structure):
    """What an update reads, as adamw.cpp has it."""

    _fields_ = (
        ("leaves", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *(
            (name, ctypes.c_double)
            for name in (
                "lr",
                "beta1",
                "beta2",
                "weight_decay",
                "eps",
                "updates",
                "multiply",
                "divide",
                "size",
                "correction",
            )
        ),
        *((name, ctypes.c_int) for name in ("decoupled", "dtype", "threads")),
    )


def update(
    params: list[Tensor],
    grads: list[Tensor],
    mu: list[Tensor],
    nu: list[Tensor],
    count: Tensor,
    factor: Tensor,
    found: Tensor,
    rates: Rates,
) -> None:
    """As the reference's."""
    leaves = [*zip(params, grads, mu, nu, strict=True)]
    if not (leaves and _takes(leaves) and native.plain(count, factor, found, *params, *grads, *mu, *nu)):
        reference.update(params, grads, mu, nu, count, factor, found, rates)
        return
    if float(found):
        return
    single, times = params[0].dtype == torch.float32, float(factor)
    if single and not 1e-37 < times < 1e37:  # its inverse is no normal number
        reference.update(params, grads, mu, nu, count, factor, found, rates)
        return
    dtype, library = params[0].dtype, native.library("adamw")
    assert library is not None  # the registry has asked
    held = (_Leaf * len(leaves))(
        *[_Leaf(p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel()) for p, g, m, v in leaves]
    )
    divide = ctypes.c_float(1 / times).value if single else 1.0  # rounded twice, which here is as once
    call = _Call(
        ctypes.addressof(held), len(leaves), float(rates.lr), rates.beta1, rates.beta2, rates.weight_decay, rates.eps,
        float(count), 1.0 if single else float(factor.to(dtype)), divide, 0.0, 0.0, rates.decoupled,
        native.DTYPES[dtype], torch.get_num_threads()
    )  # fmt: skip
    library.update(ctypes.byref(call))
    native.written(*params, *mu, *nu)


def _takes(leaves: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> bool:
    dtype = leaves[0][0].dtype
    return dtype in native.DTYPES and all(
        p.dtype == g.dtype == m.dtype == v.dtype == dtype and p.numel() == g.numel() == m.numel() == v.numel()
        for p, g, m, v in leaves
    )

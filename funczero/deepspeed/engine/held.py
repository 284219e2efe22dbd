"""Parameters that an engine holds: they share storage with its views (stages 0 to 2), or hold nothing (stage 3)."""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from enum import Enum
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from funczero.deepspeed.engine.leaf import number

CLIP = (
    "clip_grad_norm_: gradients of an engine's parameters are the chain's, not .grad; "
    "write \"gradient_clipping\" in the config, and read engine.get_global_grad_norm()"
)
NORM = (
    "grad_norm: gradients of an engine's parameters are the chain's, not .grad, so it would find none; "
    "read strategy.grad_norm() after the step"
)
READERS = {  # modules that read .grad and take None for no gradient at all
    "torch.nn.utils.clip_grad": CLIP,
    "lightning.pytorch.utilities.grads": NORM,
    "pytorch_lightning.utilities.grads": NORM,
}
_GRAD: Any = Tensor.grad  # torch's own properties
_DATA: Any = Tensor.data


class Held(nn.Parameter):
    """A parameter whose storage is the engine's."""

    home: tuple[Any, str]  # weak reference to the engine, dotted name

    @property
    def grad(self) -> Any:
        """None, as far as the engine goes; who would take that for an answer, as torch's clip, is refused."""
        refused = READERS.get(sys._getframe(1).f_globals.get("__name__", ""))
        if refused is not None:
            raise RuntimeError(refused)
        return _GRAD.__get__(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        _GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        _GRAD.__delete__(self)

    @property
    def data(self) -> Any:
        """The same memory with the same count of writes, so that the engine hears of `p.data.clamp_(...)`."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        _DATA.__set__(self, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy is an ordinary parameter."""
        return memo.setdefault(id(self), nn.Parameter(self.data.clone(), self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """So is one that is pickled."""
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, OrderedDict())


ALLOWED = {
    "numel", "nelement", "size", "dim", "ndimension", "element_size", "is_floating_point", "is_complex",
    "requires_grad_", "stride", "is_contiguous", "__hash__", "__repr__", "__len__",
}  # fmt: skip
FACTS = {  # properties that ask for no value
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "is_meta", "is_cpu",
    "is_cuda", "is_xpu", "is_mps", "is_xla", "is_hpu", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested",
    "is_mkldnn", "names", "itemsize", "nbytes", "_version", "retains_grad", "output_nr", "grad_dtype",
    "_backward_hooks", "_post_accumulate_grad_hooks", "_grad",
}  # fmt: skip
SET = {"grad", "requires_grad", "_grad", "_backward_hooks", "_post_accumulate_grad_hooks"}


class ZeroParamStatus(Enum):
    """What programs compare `param.ds_status` with."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def emptied(p: Any) -> None:
    """A parameter becomes one that is closed: its shape over one element on its device."""
    p.__class__ = nn.Parameter
    p.grad, p.data = None, torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
    p.__class__ = Closed


def filled_in(p: Any, value: Tensor) -> None:
    """A closed parameter becomes an ordinary one."""
    p.__class__ = nn.Parameter
    p.data = value


class Closed(Held):
    """A parameter of a module at stage 3: it has a shape, a dtype and a device, and no values."""

    ds_status = ZeroParamStatus.NOT_AVAILABLE
    ds_shape = property(lambda self: self.shape, doc="As a program for DeepSpeed asks for it.")
    ds_numel = property(lambda self: self.numel(), doc="Of the whole parameter.")

    @property
    def ds_id(self) -> int:
        """A number that no other parameter of this process has."""
        if "ds_number" not in self.__dict__:
            self.ds_number = next(_NUMBERS)
        return self.ds_number

    @property
    def ds_tensor(self) -> Tensor:
        """This rank's rows; of an engine's parameter those of the master."""
        engine = None if self.home[0] is None else self.home[0]()
        if engine is None:
            part = getattr(self, "part", None)
            return torch.empty(0, dtype=self.dtype) if part is None else part
        slots = engine.state.params
        return slots.leaves()[number(slots.where.structure, self.home[1])].detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy is closed, too, and of no engine."""
        return memo.setdefault(
            id(self), _orphan(self.home[1], tuple(self.shape), self.dtype, self.device, self.requires_grad)
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """So is one that is pickled."""
        return _orphan, (self.home[1], tuple(self.shape), self.dtype, self.device, self.requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What asks for no value; any other use is refused, with the correction."""
        if func.__name__ in ALLOWED or func.__name__ in ("__get__", "__set__", "__delete__") and is_fact(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        own = next((x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Closed)), None)
        name = "?" if own is None else own.home[1]
        raise RuntimeError(  # a TypeError would be taken for an operand that does not fit
            f"parameter {name!r} is sharded (stage 3) and has no values here; call engine(...) or engine.module(...), "
            "or a method of the module as engine.method(...); read engine.module.state_dict(), "
            "or open it: with deepspeed.zero.GatheredParameters(params): ..."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<sharded parameter {self.home[1]!r} {tuple(self.shape)} {self.dtype}>"


_NUMBERS = count()


def is_fact(func: Any) -> bool:
    """Does reading or writing this property of a tensor ask for no value?"""
    return getattr(getattr(func, "__self__", None), "__name__", "") in (FACTS if func.__name__ == "__get__" else SET)


def _orphan(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any, learn: bool) -> Closed:
    p: Any = nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape), learn)
    p.__class__ = Closed
    p.home, p.part = (lambda: None, name), None
    return p


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its dotted names; tied ones under each of them."""
    return dict(module.named_parameters(remove_duplicate=False))


def check_free(module: nn.Module) -> None:
    """Refuse a module whose parameters belong to an engine that is still there."""
    for name, p in named(module).items():
        home = getattr(p, "home", None)
        if home is not None and home[0] is not None and home[0]() is not None:
            why = "belongs to another engine already; give each engine a module of its own"
            raise RuntimeError(f"initialize: parameter {name!r} {why}")


def take(module: nn.Module, engine: Any, cls: type[Held]) -> None:
    """Marks a module's parameters as an engine's; closed ones keep shape, dtype and requires_grad alone."""
    for name, p in named(module).items():
        home = getattr(p, "home", None)
        if home is None or home[0] is None or home[0]() is not engine:
            if cls is Closed and type(p) is not Closed:
                emptied(p)
            p.__class__ = cls
            p.home, p.part = (weakref.ref(engine), name), None  # type: ignore[attr-defined]

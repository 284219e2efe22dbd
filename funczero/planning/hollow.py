"""A step that runs on tensors without values: shapes, dtypes and devices are those of a run, and nothing is computed.

What a run would decide by a value is answered here as a run in its ordinary course decides it: an update counts, no
value is too large for its integer, every leaf was used. Only this package's own code is answered. A loss that reads a
value is refused by name, since what it would do with it is not known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from funczero.core import tree
from funczero.core.planned import Planned
from funczero.gradients.own_draws import Named
from funczero.kernels.registry import NAMES, kernel

HOME = "funczero."
FACES = ("funczero.deepspeed", "funczero.lightning", "funczero.testing")  # they run somebody's loop
CPU = torch.device("cpu")
FAR = 2.0**40  # neither zero nor at a floor, as the scale of a loss at its floor would look at every leaf
SMALL = 1 << 10  # elements of a tensor that keeps its values
_aten, _wait = torch.ops.aten, torch.ops._c10d_functional.wait_tensor.default


class Still:
    """A generator of which nothing is drawn, for operations that compute nothing; it is its own state."""

    def get_state(self) -> Still:
        """Always the same."""
        return self

    def set_state(self, state: Any) -> None:
        """Nothing changes."""

    def manual_seed(self, seed: int) -> Still:
        """Nothing changes."""
        return self

    def numpy(self) -> numpy.ndarray[Any, Any]:
        """No words."""
        return numpy.empty(0)


class Hollow(Planned, TorchDispatchMode):
    """Answers the questions that this package asks of values, and shows every operation to `seen`."""

    def __init__(self, seen: Callable[[Any, Any, Any, Any], None], device: torch.device, mesh: Any = None) -> None:
        """seen: (operation, args, kwargs, what it returned)."""
        super().__init__(mesh)
        self.generator, self.seen, self.device = Still(), seen, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, or an answer in its place."""
        if func is _aten._to_copy.default and args[0].is_meta and not _stays(kwargs):
            _only_ours("copies values from the device")
            return torch.zeros(args[0].shape, dtype=(kwargs or {}).get("dtype") or args[0].dtype)
        if func is _aten._local_scalar_dense.default and _valueless(args[0]):
            _only_ours("reads a value of a tensor, as .item() and bool(x) do")
            return _answer(args[0].dtype)
        if func is _aten.nonzero.default and _valueless(args[0]):
            _only_ours("asks which values are not zero, and the shape of what follows hangs on them")
            return torch.empty(0, args[0].dim(), dtype=torch.int64)
        if func is _aten.equal.default and any(_valueless(x) for x in args):
            _only_ours("compares the values of two tensors")
            return True
        sends = func.namespace == "_c10d_functional"  # there is nobody to send even a number to
        if FakeTensor not in types and not sends and self.device.type != "meta" and _small((args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        # a collective that is waited for is the tensor that was launched; torch's form of it for shapes is a new one
        out = args[0] if func is _wait else self._run(func, args, kwargs or {})
        self.seen(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten._grouped_mm.default and args[0].dtype in (torch.float32, torch.float16):
            return _grouped(*args, **kwargs)
        if self.device.type != "meta":
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError:  # numbers that kept their values beside tensors that have none
            args, kwargs = tree.map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
            return func(*args, **kwargs)


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
    """The form of a grouped product in other dtypes than bfloat16: a CPU computes it, torch's own form refuses it."""
    groups = a.shape[:1] if a.dim() == b.dim() == 3 else () if offs is None or a.dim() != b.dim() else offs.shape
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]))


def _stays(kwargs: Any) -> bool:
    device = (kwargs or {}).get("device")
    return device is None or torch.device(device).type == "meta"


def _small(given: Any) -> bool:
    """Are there tensors, and are all of them numbers that a state holds, or not much more? Those keep their values."""
    found = tree.tensors(given)
    return bool(found) and all(type(x) is Tensor and x.numel() <= SMALL and not x.is_meta for x in found)


def _valueless(x: Any) -> bool:
    """Are its values not known? Those of a constant are, as torch.tensor(3) makes one."""
    return x.constant is None if isinstance(x, FakeTensor) else x.is_meta


def _answer(dtype: torch.dtype) -> Any:
    """What a value is in the ordinary course of a run: true, far from any bound, as an integer nothing to be told."""
    if dtype == torch.bool:
        return True
    return FAR if dtype.is_floating_point else 0


def _only_ours(what: str) -> None:
    """Refuse a question that somebody else's code asks.

    Raises:
      TypeError: with the place where it is asked.
    """
    frame = asker()
    name = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    if not name.startswith(HOME) or name.startswith(FACES):
        raise TypeError(values_read(what, frame))


def values_read(what: str, frame: FrameType | None) -> str:
    """The sentence for a loss that cannot be planned."""
    at = "" if frame is None else f" ({frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name})"
    why = "a plan has shapes and no values, so it does not know what comes next"
    remedy = "compute it with tensors alone, as torch.where does, or plan a loss without it"
    return f"plan: the loss{at} {what}, but {why}; {remedy}"


def asker() -> FrameType | None:
    """The innermost frame that is neither torch's nor this module's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name != __name__ and not name.startswith("torch."):
            return frame
        frame = frame.f_back
    return None


@contextmanager
def hollow(
    seen: Callable[[Any, Any, Any, Any], None] = lambda *op: None, device: torch.device = CPU, mesh: Any = None
) -> Iterator[None]:
    """Inside, tensors of a device have no values and no memory.

    Args:
      seen: as Hollow's.
      device: the CPU, whose kernels, autocast and memory are then those of a run; or meta, which is faster, and where
        nothing may be made on another device.
      mesh: the one of the plan, on which lies what a loss brings along (fz.frozen).

    Raises:
      TypeError: a loss reads a value, or makes a tensor whose shape hangs on values.

    >>> with hollow():
    ...     x = torch.ones(1 << 20, 1 << 20) @ torch.ones(1 << 20, 8)
    >>> tuple(x.shape)
    (1048576, 8)
    """
    if device.type != "meta":
        for name in NAMES:  # whoever tries a kernel tries it on values
            kernel(name, device)
    fake = nullcontext() if device.type == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
    mode = Hollow(seen, device, mesh)
    with fake, Named(mode), mode:
        try:
            yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            what = f"runs {error.func}, the result of which hangs on values"
            raise TypeError(values_read(what, innermost(error))) from error
        except UnsupportedOperatorException as error:
            why = "torch cannot say what it returns without running it"
            raise TypeError(
                f"plan: the loss runs {error.func}, and {why}; register a fake for it (torch.library)"
            ) from error


def innermost(error: BaseException) -> FrameType | None:
    """The last frame of a traceback that is neither torch's nor this package's."""
    found, trace = None, error.__traceback__
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        found = found if name.startswith(("torch.", HOME)) else trace.tb_frame
        trace = trace.tb_next
    return found


def emptied(values: Any, device: torch.device) -> Any:
    """A tree with a tensor of a device for each one that is on the meta device; others stay. Called inside `hollow`."""
    new = lambda x: torch.empty(x.shape, dtype=x.dtype, device=device)
    return tree.map(lambda x: new(x) if isinstance(x, Tensor) and x.is_meta else x, values)

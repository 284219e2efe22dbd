"""Others' pickles as inert values: an unpickler that knows a closed list of names, and for each of them a stand-in.

A pickle runs code by naming a callable. Here every name gives a stand-in of this file or is refused, so nothing of the
program that wrote it, of torch or of python is ever called; and what a pickle asks memory for is bounded by its own
length before it is read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from funczero.checkpoint.error import CheckpointError

LIMIT = 64 << 20  # bytes of a pickle
CODE = ("EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER", "BYTEARRAY8", "PERSID")

STORAGES: dict[str, torch.dtype | None] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": None,
}  # fmt: skip
DTYPES = {
    name: getattr(torch, name) for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
        "uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128",
    )
}  # fmt: skip


class Kind(NamedTuple):
    """The type of a storage, as a pickle names it."""

    dtype: torch.dtype | None  # None: of bytes, the tensor says


class Pickled(NamedTuple):
    """A tensor that a pickle describes, whose values lie elsewhere."""

    key: str  # of its storage
    held: int  # bytes of the storage, as the pickle says
    dtype: torch.dtype
    at: int  # its first value, in values
    shape: Any
    stride: Any


class Thing:
    """An object of somebody else's class: its class' name and what it holds."""

    kind = ""

    def __init__(self, *args: Any) -> None:
        self.args, self.fields = args, dict[str, Any]()

    def __setstate__(self, state: Any) -> None:
        # of a class with slots the pickle holds (dict, dict)
        self.fields = state if isinstance(state, dict) else {"state": state}


class Unknown(Exception):
    """A name that is not in the list."""


def things(*names: str) -> dict[str, Callable[[], Any]]:
    """Stand-ins for classes, each made anew for every pickle, so that none can be changed for the next."""
    return {name: lambda name=name: type("Thing", (Thing,), {"kind": name, "args": (), "fields": {}}) for name in names}  # type: ignore[misc]


def _tensor(storage: Any, at: Any, size: Any, stride: Any, *rest: Any) -> Pickled:
    kind, key, numel = storage
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else kind.dtype
    if not isinstance(dtype, torch.dtype) or type(at) is not int or type(numel) is not int:
        raise ValueError("a tensor is described by other values than torch writes")
    held = numel * (kind.dtype.itemsize if kind.dtype else 1)
    return Pickled(str(key), held, dtype, at, tuple(size), tuple(stride))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _of_type(function: Callable[..., Any], kind: Any, args: Any, state: Any) -> Any:
    if function is not _tensor:
        raise Unknown("a subclass of Tensor")
    return _tensor(*args)


def _size(values: Any) -> tuple[Any, ...]:
    return tuple(values)


def dtypes() -> dict[str, Callable[[], Any]]:
    """torch's dtypes, as themselves."""
    return {f"torch {name}": partial(getattr, torch, name) for name in DTYPES}


TORCH: dict[str, Callable[[], Any]] = {
    "collections OrderedDict": lambda: OrderedDict,
    "torch Size": lambda: _size,
    "torch Tensor": lambda: "torch.Tensor",
    "torch._utils _rebuild_tensor_v2": lambda: _tensor,
    "torch._utils _rebuild_tensor_v3": lambda: _tensor,
    "torch._utils _rebuild_parameter": lambda: _parameter,
    "torch._tensor _rebuild_from_type_v2": lambda: _of_type,
    **{f"torch {name}": partial(Kind, dtype) for name, dtype in STORAGES.items()},
    "torch.storage UntypedStorage": lambda: Kind(None),
    **dtypes(),
}


class _Closed(pickle.Unpickler):
    def __init__(self, text: bytes, known: Mapping[str, Callable[[], Any]]) -> None:
        super().__init__(io.BytesIO(text))
        self._known, self._made = known, dict[str, Any]()

    def find_class(self, module: str, name: str) -> Any:
        key = f"{module} {name}"
        if key not in self._known:
            raise Unknown(f"{module}.{name}")
        if key not in self._made:
            self._made[key] = self._known[key]()
        return self._made[key]

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], Kind):
            raise ValueError("it refers to something that is no storage")
        return pid[1], pid[2], pid[4]


def loads(text: bytes, file: str, known: Mapping[str, Callable[[], Any]] = TORCH) -> Any:
    """What a pickle describes, of plain values and stand-ins alone.

    Raises:
      CheckpointError: it names something that is not in the list, is malformed, or asks for memory that its length
        does not account for.
    """
    try:
        _scan(text)
        return _Closed(text, known).load()
    except Unknown as e:
        raise CheckpointError(
            f"import: {file!r} names {str(e)[:200]!r}, which is not among what is read; nothing of it was run. Write"
            " the weights alone, as torch.save(model.state_dict()), or safetensors"
        ) from None
    except Exception as e:  # whatever an unpickler makes of a malformed text
        raise CheckpointError(
            f"import: {file!r} is no pickle that torch writes ({type(e).__name__}: {str(e)[:200]})"
        ) from None


def _scan(text: bytes) -> None:
    """Refuse what a reader would make room for without having it, and codes that no writer of tensors uses."""
    if len(text) > LIMIT:
        raise ValueError(f"it has {len(text)} bytes, more than {LIMIT}")
    for code, value, at in pickletools.genops(text):
        if code.name in CODE:
            raise ValueError(f"it holds the code {code.name}")
        if code.name in ("LONG_BINPUT", "PUT") and not 0 <= int(value or 0) <= len(text):
            raise ValueError("it numbers more values than it can hold")
        if code.name == "FRAME" and int(value or 0) > len(text) - (at or 0):
            raise ValueError("it names a frame that is longer than itself")

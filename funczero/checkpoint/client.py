"""A client state as JSON and arrays, and back: what went in comes out, with its types, and no code is ever loaded
from disk.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funczero.checkpoint.names import escape

MARK = "$"  # how a tagged value begins
DEPTH = 100  # lists and dicts inside each other
DIGITS = 1 << 10  # bits of an integer that JSON writes in decimal, which takes quadratic time
BLOB = 1 << 12  # bytes that are kept in JSON; longer ones are an array


def encode(value: Any, name: str = "client") -> tuple[Any, dict[str, Tensor]]:
    """JSON for a tree of plain values, and its arrays by their names on disk.

    Law: `decode(*encode(x)) == x` with the same types: tuples, int keys, NaN, bytes, tensors, numpy arrays and scalars.

    >>> encode({"step": 3, 7: (1.5, None)})[0]
    {'$dict': [['step', 3], [7, {'$tuple': [1.5, None]}]]}

    Raises:
      TypeError: something else, by its path; nothing is written then.
    """
    arrays: dict[str, Tensor] = {}
    return _encode(value, (name,), arrays, []), arrays


def _encode(x: Any, path: tuple[str, ...], arrays: dict[str, Tensor], above: list[int]) -> Any:
    if type(x) is int and x.bit_length() > DIGITS:
        return {"$int": hex(x)}
    if x is None or type(x) in (bool, int, str):
        return x
    if type(x) is float:
        return x if math.isfinite(x) else {"$float": repr(x)}
    if type(x) is complex:
        return {"$complex": [_encode(x.real, path, arrays, above), _encode(x.imag, path, arrays, above)]}
    if type(x) is bytes and len(x) > BLOB:
        return _array(np.frombuffer(x, np.uint8), path, arrays) | {"kind": "bytes"}
    if type(x) is bytes:
        return {"$bytes": base64.b64encode(x).decode()}
    if isinstance(x, (Tensor, np.ndarray, np.generic)):
        return _array(x, path, arrays)
    if id(x) in above:
        raise TypeError(
            f"save: {'/'.join(path)!r} of the client state contains itself; a client state is a finite tree"
        )
    if len(above) >= DEPTH:
        raise TypeError(
            f"save: {'/'.join(path[:6])!r} of the client state has lists and dicts more than {DEPTH} deep; give a"
            " flatter one"
        )
    below = lambda key, child: _encode(child, (*path, escape(key)), arrays, [*above, id(x)])
    if type(x) in (list, tuple):
        inner = [below(i, child) for i, child in enumerate(x)]
        return inner if type(x) is list else {"$tuple": inner}
    if type(x) is dict:
        for key in x:
            if type(key) not in (str, int, bool, float, type(None)):
                raise TypeError(
                    f"save: {'/'.join(path)!r} of the client state has the key {key!r} ({type(key).__name__}); keys are"
                    " strings or numbers"
                )
        if all(type(key) is str and not key.startswith(MARK) for key in x):
            return {key: below(key, child) for key, child in x.items()}
        return {"$dict": [[_encode(key, path, arrays, above), below(key, child)] for key, child in x.items()]}
    where, kind = "/".join(path), type(x).__name__
    raise TypeError(
        f"save: {where!r} of the client state is a {kind}; give numbers, strings, bytes, None, lists, tuples, dicts,"
        " tensors or numpy arrays (a scheduler: its state_dict())"
    )


def _array(x: Any, path: tuple[str, ...], arrays: dict[str, Tensor]) -> dict[str, str]:
    name = "/".join(path)
    kind = "tensor" if isinstance(x, Tensor) else "numpy" if isinstance(x, np.ndarray) else "scalar"
    if kind != "tensor":
        try:
            x = torch.from_numpy(np.array(x))  # a copy, its own memory
        except TypeError:
            raise TypeError(
                f"save: {name!r} of the client state is a numpy array of dtype {x.dtype}; give one of numbers, or its"
                " tolist()"
            ) from None
    if x.layout != torch.strided or x.is_quantized or x.is_meta:
        raise TypeError(
            f"save: {name!r} of the client state is a {'meta' if x.is_meta else x.layout} tensor; give a plain one"
        )
    if name in arrays:
        raise ValueError(f"save: two arrays of the client state would both be stored as {name!r}; rename a key")
    arrays[name] = x.detach()
    return {"$array": name, "kind": kind}


def names(encoded: Any) -> list[str]:
    """The names of the arrays that JSON refers to."""
    out, left = [], [encoded]
    while left:
        x = left.pop()
        if isinstance(x, dict) and "$array" in x:
            out.append(x["$array"])
        elif isinstance(x, (dict, list)):
            left.extend(reversed(x.values() if isinstance(x, dict) else x))
    return out


def decode(encoded: Any, array: Callable[[str], Tensor]) -> Any:
    """The tree again; `array(name)` gives what was kept apart."""
    if isinstance(encoded, list):
        return [decode(x, array) for x in encoded]
    if not isinstance(encoded, dict):
        return encoded
    tag = next((k for k in encoded if k.startswith(MARK)), None)
    inner: Any = encoded.get(tag) if tag else None
    if tag is None:
        return {k: decode(v, array) for k, v in encoded.items()}
    if tag == "$array":
        x = array(encoded["$array"])
        kinds: dict[str, Callable[[], Any]] = {
            "tensor": lambda: x,
            "numpy": x.numpy,
            "scalar": lambda: x.numpy()[()],
            "bytes": lambda: x.numpy().tobytes(),
        }
        return kinds[encoded["kind"]]()
    made = {
        "$float": lambda: float(inner),
        "$int": lambda: int(inner, 16),
        "$bytes": lambda: base64.b64decode(inner, validate=True),
        "$tuple": lambda: tuple(decode(x, array) for x in inner),
        "$complex": lambda: complex(*(decode(x, array) for x in inner)),
        "$dict": lambda: {decode(k, array): decode(v, array) for k, v in inner},
    }
    if tag not in made:
        raise ValueError(f"restore: the client state holds {tag!r}, which this version does not know")
    return made[tag]()

"""What code says: the names and texts in it, whether it is installed, and whether an object's class is python's own."""

from __future__ import annotations

import dis
import sys
import sysconfig
import types
from functools import cache
from pathlib import Path
from typing import Any

HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def names_in(code: types.CodeType, *how: str) -> set[str]:
    """Names that a function's code, or that of a function inside it, loads by these instructions; by any without."""
    own = {str(i.argval) for i in dis.get_instructions(code) if i.opname in how} if how else set(code.co_names)
    return own.union(*(names_in(c, *how) for c in code.co_consts if isinstance(c, types.CodeType)))


def texts_in(code: types.CodeType) -> set[str]:
    """Texts in a function's code, by which getattr, globals() or an import may be told a name."""
    found = set[str]()
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            found |= texts_in(c)
        else:
            found.update(x for x in (c if isinstance(c, (tuple, frozenset)) else (c,)) if isinstance(x, str))
    return found


def in_python(cls: type) -> bool:
    """Has an object of this class no state but attributes and slots? As the standard library's copyreg asks it."""
    for base in cls.__mro__:
        new: Any = base.__new__
        if not base.__flags__ & HEAP or isinstance(new, types.BuiltinFunctionType) and new.__self__ is base:
            return base in (object, types.SimpleNamespace)
    return True


def fixed(fn: types.FunctionType) -> bool:
    """Is a function's code installed? functools.wraps gives it another one's __module__."""
    return installed(fn.__globals__.get("__name__"))


@cache
def installed(module: Any) -> bool:
    """Is a module's code fixed for a run: torch's, this package's, the standard library's, or in site-packages?

    Args:
      module: its name, as a class says it; some answer with another thing.
    """
    top = module.split(".")[0] if isinstance(module, str) else ""
    if top in ("torch", "funczero") or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    homes = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return file is not None and any(Path(file).is_relative_to(home) for home in homes)

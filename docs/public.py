"""Which names are public, and whether the reference has them all."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("funczero", "funczero.deepspeed", "funczero.hf", "funczero.lightning")
MOCKED = ["accelerate", "lightning", "peft", "transformers"]  # none of their names is ours, and they take ten seconds
WHOLE = ("data", "rng", "schedules", "tree", "writers")  # modules of `funczero` whose own names are public, too


def exported(package: str) -> list[str]:
    """What a package's __init__ exports: `import x as x`, and what it imports at its first use."""
    module = importlib.import_module(package)
    body = ast.walk(ast.parse(Path(inspect.getfile(module)).read_text()))
    names = [a.name for node in body if isinstance(node, ast.ImportFrom) for a in node.names if a.asname == a.name]
    return sorted({*names, *getattr(module, "LAZY", ())})


def defined(module: Any) -> list[str]:
    """What a module defines, or a package exports, without an underscore."""
    if hasattr(module, "__path__"):
        return exported(module.__name__)
    own = [n for n, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__ and callable(x)]
    return sorted(n for n in own if not n.startswith("_"))


def names() -> Iterator[tuple[str, Any]]:
    """Every public name, as a reader writes it, with what it is."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in exported(package):
            yield f"{package}.{name}", getattr(module, name)
    for name in WHOLE:
        module = getattr(importlib.import_module("funczero"), name)
        for inner in defined(module):
            yield f"funczero.{name}.{inner}", getattr(module, inner)


def undocumented(documented: set[str]) -> Iterator[str]:
    """A sentence for each public name that the reference lacks, or that says nothing of itself."""
    for name, what in names():
        if name not in documented:
            yield f"{name} is public, and no page of docs/reference has it"
        plain = inspect.isfunction(what) or inspect.isclass(what) or inspect.ismodule(what)
        if plain and not said(what):
            yield f"{name} is public, and has no docstring"


def said(what: Any) -> str:
    """Its own docstring; a NamedTuple's list of fields, which nobody wrote, is none."""
    text = (vars(what).get("__doc__") if inspect.isclass(what) else what.__doc__) or ""
    return "" if inspect.isclass(what) and text.startswith(f"{what.__name__}(") else text


def check(app: Any, env: Any) -> None:
    """Warns of each, and a warning fails the build."""
    from sphinx.util import logging

    for sentence in undocumented(set(env.domains["py"].objects)):
        logging.getLogger(__name__).warning(sentence)

"""Which version of a package is installed."""

from __future__ import annotations

import importlib.metadata


def version_of(package: str, instead: str = "") -> str:
    """Its version, as its metadata has it; `instead` where it is not installed.

    >>> version_of("torch") != "", version_of("nothing-of-that-name", "not installed")
    (True, 'not installed')
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return instead

"""`deepspeed` means `funczero.deepspeed` in the processes of one launch; this folder is on their PYTHONPATH alone.

Every `deepspeed.x.y` is the very module `funczero.deepspeed.x.y`, so that a class has one identity under both names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

OURS = "funczero.deepspeed"


class Same(MetaPathFinder, Loader):
    """Finds a module of that name in funczero.deepspeed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a name below deepspeed that is there."""
        if not fullname.startswith("deepspeed."):
            return None
        found = importlib.util.find_spec(OURS + fullname.removeprefix("deepspeed"))
        if found is None:
            return None
        return ModuleSpec(fullname, self, origin=found.origin, is_package=found.submodule_search_locations is not None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, which keeps its spec."""
        module = importlib.import_module(OURS + spec.name.removeprefix("deepspeed"))
        spec.loader_state = module.__spec__
        return module

    def get_code(self, fullname: str) -> CodeType | None:
        """For `python -m deepspeed.x`."""
        found = importlib.util.find_spec(OURS + fullname.removeprefix("deepspeed"))
        return None if found is None else found.loader.get_code(found.name)  # type: ignore[union-attr]

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; importing it under a second name has changed its spec."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state or module.__spec__


sys.meta_path.insert(0, Same())
sys.modules[__name__] = importlib.import_module(OURS)

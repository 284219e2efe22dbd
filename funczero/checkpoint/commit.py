"""orbax's part of a save, on rank 0: the temporary folder, the merge of all ranks' stores, its metadata, and the commit
by one rename.

orbax takes JAX along. Both are imported at the first save, in the saving thread, and JAX is told to stay on the CPU
before it looks at any device. orbax sees one process: the ranks meet in the world's store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.manifest import ARRAYS


@dataclass(frozen=True)
class Leaf:
    """A leaf as orbax is shown it (a tuple would be a tree to it): the arrays themselves never pass through."""

    name: str


class Hooks(NamedTuple):
    """What happens inside a save."""

    write: Callable[[Path], None]  # given the folder of the arrays: returns when all ranks have written
    seal: Callable[[Path], None]  # given the checkpoint's folder, complete and not yet renamed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """orbax tells absl's log each of its steps, which calls basicConfig() where the program has not, so that a later
    one of its own would do nothing.
    """
    root, absl, silent = logging.getLogger(), logging.getLogger("absl"), logging.NullHandler()
    told = lambda record: record.levelno >= logging.WARNING or "/orbax/" not in record.pathname
    root.addHandler(silent)
    absl.addFilter(told)
    try:
        yield
    finally:
        absl.removeFilter(told)
        root.handlers[:] = [h for h in root.handlers if h is not silent]


def orbax() -> Any:
    """orbax; JAX stays on the CPU unless the program already uses it.

    Importing JAX draws from numpy's global generator, so it is done where no loss runs beside it.

    Raises:
      CheckpointError: it cannot be imported.
    """
    try:
        with _quiet():
            if "jax" not in sys.modules:
                import jax

                jax.config.update("jax_platforms", "cpu")
            import orbax.checkpoint as ocp
    except ImportError as e:
        raise CheckpointError(f"save: orbax-checkpoint cannot be imported ({e}); pip install orbax-checkpoint") from e
    return ocp


def commit(final: Path, names: list[tuple[str, ...]], hooks: Hooks) -> None:
    """Save leaves of these paths into `final`: all of it appears there at once, or nothing."""
    with _quiet():
        ocp = orbax()
        kinds = _kinds(ocp)
        import jax

        # without the second it warns
        registry = ocp.type_handlers.create_type_handler_registry(
            (Leaf, kinds.arrays(hooks)), (jax.Array, ocp.type_handlers.ArrayHandler())
        )
        arrays = ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry)
        with ocp.Checkpointer(kinds.handler(hooks, **{ARRAYS: arrays})) as checkpointer:
            checkpointer.save(final.absolute(), args=kinds.args(**{ARRAYS: ocp.args.PyTreeSave(_nested(names))}))


class _Kinds(NamedTuple):
    """orbax's classes with our parts in them."""

    arrays: Any
    handler: Any
    args: Any


@cache
def _kinds(ocp: Any) -> _Kinds:
    """Made once a process: orbax keeps what is registered with it for ever, and with a class all that the class
    refers to.
    """

    class Arrays(ocp.type_handlers.TypeHandler):
        """Leaves whose bytes the ranks write themselves."""

        def __init__(self, hooks: Hooks) -> None:
            self._hooks = hooks

        def typestr(self) -> str:
            return "np.ndarray"  # what any reader of this format restores, without the mesh that wrote it

        async def metadata(self, infos: Any) -> Any:
            raise NotImplementedError

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            raise NotImplementedError

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            async def run() -> None:
                await infos[0].await_path_creation()
                await asyncio.to_thread(self._hooks.write, Path(infos[0].parent_dir))

            return [ocp.future.CommitFutureAwaitingContractedSignals(run(), name="ranks")]

    class Handler(ocp.CompositeCheckpointHandler):
        """Seals a checkpoint between its last file and its rename."""

        def __init__(self, hooks: Hooks, **items: Any) -> None:
            super().__init__(**items)
            self._hooks = hooks

        def finalize(self, directory: Any) -> None:
            super().finalize(directory)
            self._hooks.seal(Path(directory))

    @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
    class Args(ocp.args.Composite):
        """The same items."""

    return _Kinds(Arrays, Handler, Args)


def _nested(names: list[tuple[str, ...]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path in names:
        at = out
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = Leaf("/".join(path))
    return out

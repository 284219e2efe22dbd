"""ds_config.json -> a resolved config, or one sentence about the first thing in it that cannot stand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funczero.deepspeed.config.checks import agree, judged, lossy, unused
from funczero.deepspeed.config.crossing import crossing, crossing_notes
from funczero.deepspeed.config.entries import entries, typed_keys, unknown
from funczero.deepspeed.config.key import ROWS, ConfigError, Key
from funczero.deepspeed.config.keys import KEYS, LITERAL_AUTO, PASSED_OVER
from funczero.deepspeed.config.reading import Document, read
from funczero.deepspeed.config.resolved import Config, Setting
from funczero.deepspeed.config.triad import BATCH, MICRO, NAMES, STEPS, WorldSize, derive
from funczero.deepspeed.config.typed import typed
from funczero.layout.processes import world_size
from funczero.world.plain import plain

_Z = "zero_optimization."
_BY_WIDTH = {
    _Z + "reduce_bucket_size": lambda h: h * h,
    _Z + "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
    _Z + "stage3_param_persistence_threshold": lambda h: 10 * h,
}


def resolve(
    config: str | Path | Mapping[str, Any], world: int | WorldSize | None = None, auto: Mapping[str, Any] | None = None
) -> Config:
    """Reads and checks a config, and fills in what it leaves open.

    Args:
      config: a dict, a path, or base64 of its text; comments and trailing commas may stand in it.
      world: ranks that share the batch; by default those that the environment names.
      auto: values of the keys that say "auto", by dotted path; hidden_size fills the three sizes that follow from it.

    Raises:
      ConfigError: a key that does not exist, stands twice or is refused, a value of the wrong type, a contradiction, an
        "auto" that nobody filled. It says the key's path, its line and what to write.

    >>> c = resolve({"train_batch_size": 8, "zero_optimization": True}, world=2)
    >>> c.triad, c.value("zero_optimization.stage"), c.values["gradient_clipping"]
    (Triad(batch=8, micro=4, steps=1), 1, Setting(value=1.0, origin='default', line=None))
    """
    doc = read(config)
    notes: list[str] = []
    table = KEYS | typed_keys(doc)
    found: dict[str, Setting] = {}
    skipped = [k for k in doc.raw if isinstance(k, str) and (k.startswith("_") or k in PASSED_OVER)]
    read_keys = {k: v for k, v in doc.raw.items() if k not in skipped}
    notes += [f"{plain(k, 100)} is passed over, as DeepSpeed does" for k in skipped]
    for path, value, origin, spelled in entries(doc, read_keys, "", "", table):
        if path in found:
            raise ConfigError(
                f"{doc.where(spelled)}it says the same as {_spelling(found[path], path)}; delete one of the two"
            )
        found[path] = Setting(value, origin, doc.lines.get(spelled))
        if origin.startswith("alias"):
            notes.append(f"{spelled} is an old spelling of {path}")
    found, unread = _in_force(found)
    notes += unread
    found = _filled(doc, found, table, auto or {})
    found = {path: v._replace(value=typed(doc.where(path), table[path], v.value)) for path, v in found.items()}
    notes += judged(doc, found, table)
    missing = next((path for path, key in table.items() if key.default is ... and path not in found), None)
    if missing:
        block, name = missing.split(".")[0], missing.rsplit(".", 1)[1]
        why = f"{name!r} is missing, and {found[block + '.type'].value} has no default for it; add {name!r}"
        raise ConfigError(f"{doc.where(block + '.params')}{why}")
    values = {path: found.get(path, Setting(key.default, "default")) for path, key in table.items()}
    size = _world(world)
    triad = derive(values[BATCH].value, values[MICRO].value, values[STEPS].value, size, f"{doc.name}: ")
    if triad.batch > ROWS:
        said = f"{' * '.join(str(x) for x in triad[1:])} * {size.size} = {triad.batch} rows an update are out of range"
        raise ConfigError(f"{doc.where(BATCH)}{said}; write a batch of at most {ROWS:g}")
    values |= {name: Setting(x, "derived") for name, x in zip(NAMES, triad, strict=True) if values[name].value is None}
    resolved = Config(doc.name, values, size, triad, tuple(notes))
    agree(resolved)
    resolved = resolved._replace(mesh=crossing(resolved).mesh)
    return resolved._replace(notes=(*notes, *unused(resolved), *lossy(resolved), *crossing_notes(resolved)))


def _in_force(found: dict[str, Setting]) -> tuple[dict[str, Setting], list[str]]:
    """What is read: fp16's other keys only where it is on."""
    on = found.get("fp16.enabled")
    others = [path for path in found if path.startswith("fp16.") and path != "fp16.enabled"]
    if not others or on is not None and on.value is not False:
        return found, []
    note = f"fp16 is off, so {', '.join(others)} {'is' if len(others) == 1 else 'are'} not read"
    return {path: v for path, v in found.items() if path not in others}, [note]


def _world(world: int | WorldSize | None) -> WorldSize:
    if isinstance(world, WorldSize):
        return world
    if world is None:
        return WorldSize(
            world_size(), "WORLD_SIZE of the environment" if "WORLD_SIZE" in os.environ else "the processes there are"
        )
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise ConfigError(f"world: {world!r} is not a number of processes; write an int of at least 1")
    return WorldSize(world, "the argument world")


def _spelling(v: Setting, path: str) -> str:
    return v.origin.removeprefix("alias ") if v.origin.startswith("alias") else path


def _filled(
    doc: Document, found: dict[str, Setting], table: Mapping[str, Key], auto: Mapping[str, Any]
) -> dict[str, Setting]:
    """The one place where "auto" is replaced."""
    for name in auto:
        if (
            name not in table
            and name != "hidden_size"
            and not name.startswith(("optimizer.params.", "scheduler.params."))
        ):
            raise ConfigError(f"auto: {name}: {unknown('', name, table)}")
    width = auto.get("hidden_size")
    given = {
        path: fn(typed("auto: hidden_size: ", Key("int", 1, low=1, high=ROWS), width))
        for path, fn in _BY_WIDTH.items()
        if width is not None
    } | dict(auto)
    open_ = [
        p
        for p, v in found.items()
        if isinstance(v.value, str) and v.value.lower() == "auto" and p not in LITERAL_AUTO and table[p].kind != "off"
    ]
    unresolved = [p for p in open_ if p not in given]
    if unresolved:
        lines = ", ".join(f"{p}{f' (line {doc.lines[p]})' if p in doc.lines else ''}" for p in unresolved)
        remedy = f"write values, or hand them over as auto={{{unresolved[0]!r}: ...}}"
        raise ConfigError(f'{doc.name}: nobody filled in "auto" of {lines}; {remedy}')
    return {p: v._replace(value=given[p], origin="auto") if p in open_ else v for p, v in found.items()}

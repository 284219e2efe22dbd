"""ds_config.json as a value: every key with its value and where it came from, or one sentence about the first that cannot stand."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from funczero.deepspeed.config.keys import ALIASES, KEYS, LITERAL_AUTO, NO_OP, REFUSED, ROWS, ConfigError, Key, switched_off
from funczero.deepspeed.config.options import optimizer_keys, scheduler_keys
from funczero.deepspeed.config.reading import Document, read
from funczero.deepspeed.config.triad import BATCH, MICRO, NAMES, STEPS, Triad, World, derive
from funczero.deepspeed.config.typed import as_json, typed
from funczero.layout.mesh import world_size

_Z = "zero_optimization."
_BY_WIDTH = {
    _Z + "reduce_bucket_size": lambda h: h * h,
    _Z + "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
    _Z + "stage3_param_persistence_threshold": lambda h: 10 * h,
}
DTYPES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


class Value(NamedTuple):
    """A key's value and its origin: file, default, auto, derived, or the old spelling it was given under."""

    value: Any
    origin: str
    line: int | None = None


class Config(NamedTuple):
    """A resolved config: every key that exists, dotted, with its value."""

    name: str
    values: dict[str, Value]
    world: World
    triad: Triad
    notes: tuple[str, ...]  # what was accepted without effect, one sentence each

    def value(self, path: str) -> Any:
        """The value of a key by its dotted path, as config.value("zero_optimization.stage")."""
        return self.values[path].value

    def block(self, prefix: str) -> dict[str, Any]:
        """The values of one block by their last names."""
        return {path[len(prefix) + 1 :]: v.value for path, v in self.values.items() if path.startswith(prefix + ".")}

    def where(self, path: str) -> str:
        """The beginning of a message about a key."""
        line = self.values[path].line if path in self.values else None
        return f"{self.name}{f':{line}' if line else ''}: {path}: "

    @property
    def compute(self) -> str:
        """The dtype of forward and backward."""
        return "float16" if self.value("fp16.enabled") else "bfloat16" if self.value("bf16.enabled") else "float32"

    @property
    def policy(self) -> str:
        """The policy's string: float32 masters, sums in float32 unless data_types.grad_accum_dtype says otherwise."""
        return f"params=float32,compute={self.compute},accumulate={dtype_name(self.value('data_types.grad_accum_dtype')) or 'float32'}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What `train_step` needs beside the chain: train_step(*chain, **config.arguments)."""
        return {"mesh": {"data": self.world.size}, "policy": self.policy}


def dtype_name(text: str | None) -> str | None:
    """torch's name of a dtype in any of DeepSpeed's spellings."""
    return None if text is None else DTYPES.get(text.removeprefix("torch."), text.removeprefix("torch."))


def resolve(config: str | Path | Mapping[str, Any], world: int | World | None = None, auto: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks a config, and fills in what it leaves open.

    Args:
      config: a dict, a path, or base64 of its text; comments and trailing commas may stand in it.
      world: ranks that share the batch; by default those that the environment names.
      auto: values of the keys that say "auto", by dotted path; hidden_size fills the three sizes that follow from it.

    Raises:
      ConfigError: a key that does not exist, stands twice or is refused, a value of the wrong type, a contradiction, an "auto"
        that nobody filled; with the key's path, its line and what to write.

    >>> c = resolve({"train_batch_size": 8, "zero_optimization": True}, world=2)
    >>> c.triad, c.value("zero_optimization.stage"), c.values["gradient_clipping"]
    (Triad(batch=8, micro=4, steps=1), 1, Value(value=1.0, origin='default', line=None))
    """
    doc = read(config)
    notes: list[str] = []
    table = KEYS | _dynamic(doc)
    found: dict[str, Value] = {}
    for path, value, origin, spelled in _entries(doc, doc.raw, "", "", table):
        if path in found:
            raise ConfigError(f"{doc.where(spelled)}it says the same as {_spelling(found[path], path)}; delete one of the two")
        found[path] = Value(value, origin, doc.lines.get(spelled))
        if origin.startswith("alias"):
            notes.append(f"{spelled} is an old spelling of {path}")
    found = _filled(doc, found, table, auto or {})
    found = {path: v._replace(value=typed(doc.where(path), table[path], v.value)) for path, v in found.items()}
    notes += _judged(doc, found, table)
    missing = next((path for path, key in table.items() if key.default is ... and path not in found), None)
    if missing:
        block, name = missing.split(".")[0], missing.rsplit(".", 1)[1]
        raise ConfigError(f"{doc.where(block + '.params')}{name!r} is missing, and {found[block + '.type'].value} has no default for it; add {name!r}")
    values = {path: found.get(path, Value(key.default, "default")) for path, key in table.items()}
    size = _world(world)
    triad = derive(values[BATCH].value, values[MICRO].value, values[STEPS].value, size, f"{doc.name}: ")
    if triad.batch > ROWS:
        said = f"{' * '.join(str(x) for x in triad[1:])} * {size.size} = {triad.batch} rows an update are out of range"
        raise ConfigError(f"{doc.where(BATCH)}{said}; write a batch of at most {ROWS:g}")
    values |= {name: Value(x, "derived") for name, x in zip(NAMES, triad, strict=True) if values[name].value is None}
    resolved = Config(doc.name, values, size, triad, tuple(notes))
    _agree(resolved)
    return resolved._replace(notes=(*notes, *_unused(resolved), *_lossy(resolved)))


# --- parts ------------------------------------------------------------------------------------------------------------
def _world(world: int | World | None) -> World:
    if isinstance(world, World):
        return world
    if world is None:
        return World(world_size(), "WORLD_SIZE of the environment" if "WORLD_SIZE" in os.environ else "the processes there are")
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise ConfigError(f"world: {world!r} is not a number of processes; write an int of at least 1")
    return World(world, "the argument world")


def _dynamic(doc: Document) -> dict[str, Key]:
    """The keys of optimizer.params and scheduler.params, which depend on the types."""
    out: dict[str, Key] = {}
    for block in ("optimizer", "scheduler"):
        own = doc.raw.get(block)
        if own is None:
            continue
        if not isinstance(own, dict):
            raise ConfigError(f'{doc.where(block)}{as_json(own, repr)} is no block; write {{"type": ..., "params": {{...}}}}')
        name, where = own.get("type"), doc.where(f"{block}.type" if "type" in own else block)
        if not isinstance(name, str):
            near = get_close_matches("type", [k for k in own if isinstance(k, str) and k != "params"], 1, 0.5)
            if name is None and near and "type" not in own:
                raise ConfigError(f"{doc.where(f'{block}.{near[0]}')}there is no such key; write 'type'")
            raise ConfigError(f'{where}it has no type that is text; write "type": {as_json("Adam" if block == "optimizer" else "WarmupLR")}')
        params = own.get("params")
        torch_adam = isinstance(params, dict) and params.get("torch_adam") is True and (name.lower() == "adamw" or params.get("adam_w_mode") is not False)
        if isinstance(params, dict) and block == "optimizer" and "max_grad_norm" in params:
            raise ConfigError(f"{doc.where('optimizer.params.max_grad_norm')}it is not the optimizer's; write gradient_clipping at the top level")
        keys = optimizer_keys(name, where, torch_adam) if block == "optimizer" else scheduler_keys(name, where)
        out |= {f"{block}.params.{k}": v for k, v in keys.items()}
    return out


def _entries(doc: Document, raw: Mapping[Any, Any], prefix: str, spelling: str, table: Mapping[str, Key]) -> Iterator[tuple[str, Any, str, str]]:
    """(path, value, origin, path as spelled) of every key that is there, old spellings translated."""
    for key, value in raw.items():
        if not isinstance(key, str):
            raise ConfigError(f"{doc.where(prefix.rstrip('.') or as_json(key, repr))}the key {as_json(key, repr)} is a {type(key).__name__}; write text")
        if "." in key:
            raise ConfigError(f"{doc.where(spelling + key)}there is no such key; write blocks in blocks, {{{as_json(key.split('.')[0])}: {{...}}}}")
        spelled = spelling + key
        path = ALIASES.get(prefix + key, prefix + key)
        origin = "file" if doc.lines else "dict"
        if spelled != path:
            origin = f"alias {spelled}"
        if path == "zero_optimization" and isinstance(value, bool):
            yield _Z + "stage", int(value), "alias zero_optimization: " + str(value).lower(), spelled
        elif path in (_Z + "cpu_offload", _Z + "cpu_offload_param"):
            device = typed(doc.where(spelled), Key("flag", False), value)
            yield _Z + ("offload_param" if "param" in path else "offload_optimizer") + ".device", "cpu" if device else "none", f"alias {spelled}", spelled
        elif path in table:
            yield path, value, origin, spelled
        elif any(k.startswith(path + ".") for k in table):
            if value is None and path in (_Z + "offload_optimizer", _Z + "offload_param"):
                continue
            if not isinstance(value, dict):
                inside = sorted({k[len(path) + 1 :].split(".")[0] for k in table if k.startswith(path + ".")})
                raise ConfigError(f"{doc.where(spelled)}{as_json(value, repr)} is no block; write {{...}} with some of {', '.join(inside[:6])}")
            if path != spelled and path in doc.raw:
                raise ConfigError(f"{doc.where(spelled)}it says the same as {path}; delete one of the two")
            yield from _entries(doc, value, path + ".", spelled + ".", table)
        else:
            raise ConfigError(doc.where(spelled) + _unknown(prefix, key, table))


def _unknown(prefix: str, key: str, table: Mapping[str, Key]) -> str:
    """Why a key does not exist, and the nearest that does."""
    key = key[:100]  # no name is longer, and the nearest one takes the product of the lengths
    here = {p[len(prefix) :].split(".")[0] for p in (*table, *ALIASES, _Z + "cpu_offload", "optimizer.params", "scheduler.params") if p.startswith(prefix)}
    low = {x.lower(): x for x in sorted(here)}
    close = get_close_matches(key.lower(), list(low), 1, 0.7)
    if close:
        return f"there is no such key; write {low[close[0]]!r}"
    elsewhere = sorted({p for p in table if p.split(".")[-1] == key or p.split(".")[0] == key}, key=len)
    if elsewhere:
        return f"there is no such key here; its place is {elsewhere[0]}"
    parent = prefix.rstrip(".") or "the top level"
    close = get_close_matches(key.lower(), list(low), 3, 0.0)
    return f"there is no such key in {parent}; delete it, or write one of {', '.join(low[c] for c in close)}"


def _spelling(v: Value, path: str) -> str:
    return v.origin.removeprefix("alias ") if v.origin.startswith("alias") else path


def _filled(doc: Document, found: dict[str, Value], table: Mapping[str, Key], auto: Mapping[str, Any]) -> dict[str, Value]:
    """The one place where "auto" is replaced."""
    for name in auto:
        if name not in table and name != "hidden_size" and not name.startswith(("optimizer.params.", "scheduler.params.")):
            raise ConfigError(f"auto: {name}: {_unknown('', name, table)}")
    width = auto.get("hidden_size")
    given = {path: fn(typed("auto: hidden_size: ", Key("int", 1, low=1, high=ROWS), width)) for path, fn in _BY_WIDTH.items() if width is not None} | dict(auto)
    open_ = [p for p, v in found.items() if isinstance(v.value, str) and v.value.lower() == "auto" and p not in LITERAL_AUTO and table[p].kind != "off"]
    unresolved = [p for p in open_ if p not in given]
    if unresolved:
        lines = ", ".join(f"{p}{f' (line {doc.lines[p]})' if p in doc.lines else ''}" for p in unresolved)
        raise ConfigError(f'{doc.name}: nobody filled in "auto" of {lines}; write values, or hand them over as auto={{{unresolved[0]!r}: ...}}')
    return {p: v._replace(value=given[p], origin="auto") if p in open_ else v for p, v in found.items()}


def _judged(doc: Document, found: Mapping[str, Value], table: Mapping[str, Key]) -> list[str]:
    """Refuses what would change the training; a note for every key that changes nothing here."""
    notes = []
    for path, (value, origin, line) in found.items():
        key, name = table[path], origin.removeprefix("alias ") if origin.startswith("alias") else path
        where = f"{doc.name}{f':{line}' if line else ''}: {name}: "
        if key.kind == "off":
            if not switched_off(value):
                raise ConfigError(f"{where}it is switched on: {key.say}")
            notes.append(f"{name} is switched off: {key.say}")
        elif key.handling == REFUSED and value not in (key.default, *key.off):
            raise ConfigError(f"{where}{as_json(value)} would change the training: {key.say}")
        elif key.handling == NO_OP and value != key.default:
            notes.append(f"{name} = {as_json(value)} changes nothing: {key.say}")
    return notes


def _unused(c: Config) -> list[str]:
    """Values of the optimizer that its scheduler does not read."""
    kind, top = c.value("scheduler.type"), c.block("scheduler.params")
    given = lambda name: c.values.get(f"optimizer.params.{name}", Value(None, "default")).origin != "default"
    out = []
    if given("lr") and (kind in ("LRRangeTest", "OneCycle") or top.get("warmup_max_lr") not in (None, c.value("optimizer.params.lr"))):
        out.append(f"optimizer.params.lr = {c.value('optimizer.params.lr')} is not used: {kind} writes its own rates")
    if kind == "OneCycle" and top["cycle_momentum"]:
        if "optimizer.params.betas" not in c.values:
            out.append(f"{kind} cycles no momentum: {c.value('optimizer.type')} has no betas")
        elif given("betas"):
            out.append(f"optimizer.params.betas is not used: {kind} moves the first and sets the second to 0.99")
    return out


def _lossy(c: Config) -> list[str]:
    """Sums that round more than they must."""
    wire, wide = dtype_name(c.value("communication_data_type")), dtype_name(c.value("data_types.grad_accum_dtype"))
    out = (
        []
        if wire in (None, "float32", c.compute)
        else [f"communication_data_type rounds gradients to {wire} before they are sent: the same-bits promise is off"]
    )
    return out if wide in (None, "float32") else [*out, f"data_types.grad_accum_dtype sums gradients in {wide}: the same-bits promise is off"]


def _agree(c: Config) -> None:
    """Contradictions between keys that are each well by themselves."""
    if c.value("fp16.enabled") and c.value("bf16.enabled"):
        raise ConfigError(f'{c.where("bf16.enabled")}fp16 and bf16 are both enabled; write "enabled": false in one of them')
    if c.value("fp16.enabled") and not c.value("fp16.loss_scale") and c.value("fp16.min_loss_scale") > 2.0 ** c.value("fp16.initial_scale_power"):
        said = f"the smallest scale is above the first one, 2^{c.value('fp16.initial_scale_power')}"
        raise ConfigError(f"{c.where('fp16.min_loss_scale')}{said}; write 1, or a larger initial_scale_power")
    own = dtype_name(c.value("data_types.param_dtype"))
    if own not in (None, c.compute):
        raise ConfigError(f"{c.where('data_types.param_dtype')}it says {own}, but the enabled precision is {c.compute}; delete it, or enable that precision")
    if c.value("gradient_allreduce_op") == "sum" and c.value(_Z + "stage") == 3:
        raise ConfigError(
            f'{c.where("gradient_allreduce_op")}"sum" is not defined at stage 3; write "mean" and a learning rate {c.world.size} times larger, or stage 2'
        )
    if c.value("data_parallel_size") not in (None, c.world.size):
        raise ConfigError(f"{c.where('data_parallel_size')}{c.value('data_parallel_size')} is not the world size {c.world.size} ({c.world.origin}); delete it")
    wire = dtype_name(c.value("communication_data_type"))
    if c.value(_Z + "stage") == 3 and wire not in (None, "float32", c.compute):
        raise ConfigError(f"{c.where('communication_data_type')}at stage 3 gradients travel as they are born, in {c.compute}; delete it, or write stage 2")

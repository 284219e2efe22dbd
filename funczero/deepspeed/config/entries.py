"""What a document says, key by key: old spellings are translated, and what does not exist is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from funczero.deepspeed.config.key import ConfigError, Key
from funczero.deepspeed.config.keys import ALIASES
from funczero.deepspeed.config.options import optimizer_keys, scheduler_keys
from funczero.deepspeed.config.reading import Document
from funczero.deepspeed.config.typed import as_json, typed

_Z = "zero_optimization."


def typed_keys(doc: Document) -> dict[str, Key]:
    """The keys of optimizer.params and scheduler.params, which depend on the types."""
    out: dict[str, Key] = {}
    for block in ("optimizer", "scheduler"):
        own = doc.raw.get(block)
        if own is None:
            continue
        if not isinstance(own, dict):
            raise ConfigError(
                f'{doc.where(block)}{as_json(own, repr)} is no block; write {{"type": ..., "params": {{...}}}}'
            )
        name, where = own.get("type"), doc.where(f"{block}.type" if "type" in own else block)
        if not isinstance(name, str):
            near = get_close_matches("type", [k for k in own if isinstance(k, str) and k != "params"], 1, 0.5)
            if name is None and near and "type" not in own:
                raise ConfigError(f"{doc.where(f'{block}.{near[0]}')}there is no such key; write 'type'")
            some = as_json("Adam" if block == "optimizer" else "WarmupLR")
            raise ConfigError(f'{where}it has no type that is text; write "type": {some}')
        params = own.get("params")
        torch_adam = (
            isinstance(params, dict)
            and params.get("torch_adam") is True
            and (name.lower() == "adamw" or params.get("adam_w_mode") is not False)
        )
        if isinstance(params, dict) and block == "optimizer" and "max_grad_norm" in params:
            why = "it is not the optimizer's; write gradient_clipping at the top level"
            raise ConfigError(f"{doc.where('optimizer.params.max_grad_norm')}{why}")
        keys = optimizer_keys(name, where, torch_adam) if block == "optimizer" else scheduler_keys(name, where)
        out |= {f"{block}.params.{k}": v for k, v in keys.items()}
    return out


def entries(
    doc: Document, raw: Mapping[Any, Any], prefix: str, spelling: str, table: Mapping[str, Key]
) -> Iterator[tuple[str, Any, str, str]]:
    """(path, value, origin, path as spelled) of every key that is there, old spellings translated."""
    for key, value in raw.items():
        if not isinstance(key, str):
            shown = as_json(key, repr)
            where = doc.where(prefix.rstrip(".") or shown)
            raise ConfigError(f"{where}the key {shown} is a {type(key).__name__}; write text")
        if "." in key:
            block = as_json(key.split(".")[0])
            why = f"there is no such key; write blocks in blocks, {{{block}: {{...}}}}"
            raise ConfigError(f"{doc.where(spelling + key)}{why}")
        spelled = spelling + key
        path = ALIASES.get(prefix + key, prefix + key)
        origin = "file" if doc.lines else "dict"
        if spelled != path:
            origin = f"alias {spelled}"
        if path == "zero_optimization" and isinstance(value, bool):
            yield _Z + "stage", int(value), "alias zero_optimization: " + str(value).lower(), spelled
        elif path in (_Z + "cpu_offload", _Z + "cpu_offload_param"):
            device = typed(doc.where(spelled), Key("flag", False), value)
            yield (
                _Z + ("offload_param" if "param" in path else "offload_optimizer") + ".device",
                "cpu" if device else "none",
                f"alias {spelled}",
                spelled,
            )
        elif path in table:
            yield path, value, origin, spelled
        elif any(k.startswith(path + ".") for k in table):
            if value is None and path in (_Z + "offload_optimizer", _Z + "offload_param"):
                continue
            if not isinstance(value, dict):
                inside = sorted({k[len(path) + 1 :].split(".")[0] for k in table if k.startswith(path + ".")})
                why = f"{as_json(value, repr)} is no block; write {{...}} with some of {', '.join(inside[:6])}"
                raise ConfigError(f"{doc.where(spelled)}{why}")
            if path != spelled and path in doc.raw:
                raise ConfigError(f"{doc.where(spelled)}it says the same as {path}; delete one of the two")
            yield from entries(doc, value, path + ".", spelled + ".", table)
        else:
            raise ConfigError(doc.where(spelled) + unknown(prefix, key, table))


def unknown(prefix: str, key: str, table: Mapping[str, Key]) -> str:
    """Why a key does not exist, and the nearest that does."""
    key = key[:100]  # no name is longer, and the nearest one takes the product of the lengths
    here = {
        p[len(prefix) :].split(".")[0]
        for p in (*table, *ALIASES, _Z + "cpu_offload", "optimizer.params", "scheduler.params")
        if p.startswith(prefix)
    }
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

"""What must hold between values that are each well by themselves, and what is accepted without effect."""

from __future__ import annotations

from collections.abc import Mapping

from funczero.deepspeed.config.key import NO_OP, REFUSED, ConfigError, Key, switched_off
from funczero.deepspeed.config.keys import OFFLOADS
from funczero.deepspeed.config.reading import Document
from funczero.deepspeed.config.resolved import Config, Setting, dtype_name
from funczero.deepspeed.config.typed import as_json
from funczero.layout.processes import default_device


def judged(doc: Document, found: Mapping[str, Setting], table: Mapping[str, Key]) -> list[str]:
    """Refuses what would change the training; a note for every key that changes nothing here."""
    notes = []
    for path, (value, origin, line) in found.items():
        key, name = table[path], origin.removeprefix("alias ") if origin.startswith("alias") else path
        where = f"{doc.name}{f':{line}' if line else ''}: {name}: "
        if key.kind == "off":
            if not switched_off(value):
                raise ConfigError(f"{where}it is switched on: {key.say}")
            notes.append(f"{name} is switched off: {key.say}")
        elif path in OFFLOADS and value != key.default and default_device().type == "cpu":
            notes.append(f"{name} = {as_json(value)} changes nothing: there is no accelerator, so all is in memory")
        elif key.handling == REFUSED and value not in (key.default, *key.off):
            raise ConfigError(f"{where}{as_json(value)} would change the training: {key.say}")
        elif key.handling == NO_OP and value != key.default:
            notes.append(f"{name} = {as_json(value)} changes nothing: {key.say}")
    return notes


def unused(c: Config) -> list[str]:
    """Values of the optimizer that its scheduler does not read."""
    kind, top = c.value("scheduler.type"), c.block("scheduler.params")
    given = lambda name: c.values.get(f"optimizer.params.{name}", Setting(None, "default")).origin != "default"
    out = []
    if given("lr") and (
        kind in ("LRRangeTest", "OneCycle") or top.get("warmup_max_lr") not in (None, c.value("optimizer.params.lr"))
    ):
        out.append(f"optimizer.params.lr = {c.value('optimizer.params.lr')} is not used: {kind} writes its own rates")
    if kind == "OneCycle" and top["cycle_momentum"]:
        if "optimizer.params.betas" not in c.values and c.value("optimizer.type") is not None:
            out.append(f"{kind} cycles no momentum: {c.value('optimizer.type')} has no betas")
        elif given("betas"):
            out.append(f"optimizer.params.betas is not used: {kind} moves the first and sets the second to 0.99")
    return out


def lossy(c: Config) -> list[str]:
    """Sums that round more than they must."""
    wire, wide = dtype_name(c.value("communication_data_type")), dtype_name(c.value("data_types.grad_accum_dtype"))
    out = (
        []
        if wire in (None, "float32", c.compute)
        else [f"communication_data_type rounds gradients to {wire} before they are sent: the same-bits promise is off"]
    )
    return (
        out
        if wide in (None, "float32")
        else [*out, f"data_types.grad_accum_dtype sums gradients in {wide}: the same-bits promise is off"]
    )


def agree(c: Config) -> None:
    """Contradictions between keys that are each well by themselves."""
    if c.value("fp16.enabled") and c.value("bf16.enabled"):
        raise ConfigError(
            f'{c.where("bf16.enabled")}fp16 and bf16 are both enabled; write "enabled": false in one of them'
        )
    if (
        c.value("fp16.enabled")
        and not c.value("fp16.loss_scale")
        and c.value("fp16.min_loss_scale") > 2.0 ** c.value("fp16.initial_scale_power")
    ):
        said = f"the smallest scale is above the first one, 2^{c.value('fp16.initial_scale_power')}"
        raise ConfigError(f"{c.where('fp16.min_loss_scale')}{said}; write 1, or a larger initial_scale_power")
    own = dtype_name(c.value("data_types.param_dtype"))
    if own not in (None, c.compute):
        why = f"it says {own}, but the enabled precision is {c.compute}; delete it, or enable that precision"
        raise ConfigError(f"{c.where('data_types.param_dtype')}{why}")
    if c.value("gradient_allreduce_op") == "sum" and c.value("zero_optimization.stage") == 3:
        instead = f'write "mean" and a learning rate {c.world.size} times larger, or stage 2'
        raise ConfigError(f'{c.where("gradient_allreduce_op")}"sum" is not defined at stage 3; {instead}')
    size = c.value("data_parallel_size")
    if size not in (None, c.world.size):
        why = f"{size} is not the world size {c.world.size} ({c.world.origin}); delete it"
        raise ConfigError(f"{c.where('data_parallel_size')}{why}")
    wire = dtype_name(c.value("communication_data_type"))
    if c.value("zero_optimization.stage") == 3 and wire not in (None, "float32", c.compute):
        why = f"at stage 3 gradients travel as they are born, in {c.compute}; delete it, or write stage 2"
        raise ConfigError(f"{c.where('communication_data_type')}{why}")

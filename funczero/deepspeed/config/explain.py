"""`funczero config resolve` and `diff`: what a config says, what follows from it, and where DeepSpeed would do otherwise."""
from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from funczero.core import tree
from funczero.core.types import GradientTransformation
from funczero.deepspeed.config.build import chain_of, optimizer_of, rates_of
from funczero.deepspeed.config.keys import ConfigError
from funczero.deepspeed.config.reading import parsed
from funczero.deepspeed.config.resolve import Config, resolve
from funczero.gradients.gradient import value_and_grad
from funczero.layout.mesh import P
from funczero.step.step import train_step

ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


class Bytes(NamedTuple):
    """Memory at rest or within an update, in bytes a parameter on one rank."""

    what: str
    dtype: str
    copies: float
    over: int  # ranks it is split over

    @property
    def each(self) -> float:
        """Bytes a parameter on one rank."""
        return self.copies * ITEM[self.dtype] / self.over


def memory(config: Config, optimizer: GradientTransformation) -> list[Bytes]:
    """What a rank holds of every parameter above the stage's threshold, activations and messages aside.

    >>> c = resolve({"train_batch_size": 8, "gradient_accumulation_steps": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
    ...              "optimizer": {"type": "Adam"}}, world=2)
    >>> [(b.what, b.each) for b in memory(c, optimizer_of(c))]
    [('masters', 2.0), ('views', 2.0), ('moments', 4.0), ('gradient as it is born', 2.0), ('accumulators', 6.0)]
    """
    stage, w, k = config.value("zero_optimization.stage"), config.world.size, config.triad.steps
    probe = optimizer.init({"p": torch.zeros(64)})
    moments = sum(x.numel() for x in tree.tensors(probe) if x.dim()) / 64
    compute, wide = config.compute, config.policy.rsplit("=", 1)[1]
    rows = [
        Bytes("masters", "float32", 1, w if stage else 1),
        Bytes("views", compute, int(stage in (1, 2) or compute != "float32"), w if stage == 3 else 1),
        Bytes("moments", "float32", moments, w if stage else 1),
        Bytes("gradient as it is born", compute, 1, w if stage == 3 else 1),
        Bytes("accumulators", wide, k.bit_length() if k > 1 else 0, w if stage >= 2 else 1),
    ]
    return [b for b in rows if b.copies]


def differences(config: Config) -> list[str]:
    """Every place where DeepSpeed 0.19.8 would do otherwise with this config."""
    stage, k, origin = config.value("zero_optimization.stage"), config.triad.steps, config.values["gradient_clipping"].origin
    fp16, kind, half = config.block("fp16"), config.value("optimizer.type"), config.compute != "float32"
    scheduler = config.values["scheduler.type"].value
    many = k * config.world.size > 1
    rules = {
        "gradient_clipping is absent and so 1.0: as there since June 2026, but older versions did not clip; write it": origin == "default",
        f"gradients are summed in float32 here, in {config.compute} there": half and many and config.values["data_types.grad_accum_dtype"].value is None,
        "the loss is a sum divided by its weight once; there every micro-batch counts alike, whatever it weighs": many,
        "a gradient that is not finite skips the update; there it enters the weights": not half and stage == 0,
        "the loss is scaled; there, at stage 0, only the gradient is divided by the scale": fp16["enabled"] and stage == 0,
        "hysteresis counts and the floor raises; there, at stage 0, neither does": fp16["enabled"] and stage == 0 and not fp16["loss_scale"],
        "the update on which the scale doubles is whole; there it is halved": fp16["enabled"] and not fp16["loss_scale"],
        "leaves under stage3_param_persistence_threshold also keep whole moments; there those are split": stage == 3,
        f"{kind} runs under ZeRO, value by value; there it needs zero_allow_untested_optimizer": kind not in (None, *_TESTED)
        and stage > 0
        and not config.value("zero_allow_untested_optimizer"),
        "after loading a checkpoint the rate is schedule(updates) at once; there it is the constructor's until the next step": scheduler is not None,
        f"shards are rows of a leaf; there they are pieces of {'a flattened leaf' if stage == 3 else 'one flat buffer'}": stage > 0,
    }
    return [text for text, holds in rules.items() if holds]


_TESTED = ("Adam", "AdamW", "Adagrad", "adam", "adamw", "adagrad", "Lion", "lion")


def explain(config: Config, parameters: float | None = None) -> str:
    """The resolved config as text: values with origins, the triad, the chain, memory, notes, differences.

    Args:
      parameters: of the model; with it bytes are totals.
    """
    given = {p: v for p, v in config.values.items() if v.origin != "default"}
    rest = {p: v for p, v in config.values.items() if v.origin == "default"}
    wide = max(map(len, config.values)) + 2
    lines = [f"{config.name} on {config.world.size} ranks ({config.world.origin})", "", "values"]
    for path, v in {**given, **rest}.items():
        lines.append(f"  {path:<{wide}}{_shown(v.value):<24}{v.origin}{f', line {v.line}' if v.line else ''}")
    t = config.triad
    lines += ["", "batch", f"  {t.batch} rows an update = {t.micro} a micro-batch * {t.steps} micro-batches * {config.world.size} ranks"]
    try:
        tx = optimizer_of(config)
    except ConfigError as e:
        return "\n".join(
            [*lines, "", "chain", f"  none: {e}", *_section("notes", config.notes), *_section("DeepSpeed would do otherwise", differences(config))]
        )
    step = train_step(*chain_of(config, value_and_grad(_no_loss, P("data")), tx), **config.arguments)
    lines += ["", "chain", *(f"  {x}" for x in str(step).splitlines()), *_rates(config)]
    rows = memory(config, tx)
    unit = "bytes a parameter" if parameters is None else f"MB for {parameters:,.0f} parameters"
    lines += ["", f"memory of a rank, in {unit}, without activations and messages"]
    for b in [*rows, None]:
        each = sum(r.each for r in rows) if b is None else b.each
        name = "in all" if b is None else f"{b.what} ({b.copies:g} in {b.dtype}{f', over {b.over} ranks' if b.over > 1 else ''})"
        lines.append(f"  {name:<{wide}}{each:8.2f}" if parameters is None else f"  {name:<{wide}}{each * parameters / 1e6:12,.1f}")
    return "\n".join([*lines, *_section("notes", config.notes), *_section("DeepSpeed would do otherwise", differences(config))])


def _no_loss(params: Any, batch: Any) -> Any:
    raise NotImplementedError


def _rates(config: Config) -> list[str]:
    lr, momentum = rates_of(config)
    points = (0, 1, 10, 100, 1000, 10000)

    def at(f: Any) -> str:
        return ", ".join(f"{f(torch.tensor(u)).item():.3g}" for u in points) if callable(f) else f"{f:.3g}"

    rows = [f"  lr after {', '.join(map(str, points))} updates: {at(lr)}" if callable(lr) else f"  lr: {at(lr)}"] if lr is not None else []
    return rows + ([f"  beta 1 there: {at(momentum)}"] if momentum else [])


def _section(title: str, lines: Any) -> list[str]:
    return ["", title, *(f"  {x}" for x in lines)] if lines else []


def _shown(x: Any) -> str:
    return {True: "true", False: "false", None: "-"}.get(x, str(x)) if isinstance(x, bool) or x is None else str(x)


def diff(a: Config, b: Config) -> list[str]:
    """Every key whose resolved value differs, as lines; keys that only one of the two has say "absent"."""
    out = []
    for path in dict.fromkeys((*a.values, *b.values)):
        x, y = a.values.get(path), b.values.get(path)
        if x is None or y is None or x.value != y.value:
            said = ["absent" if v is None else f"{_shown(v.value)} ({v.origin})" for v in (x, y)]
            out.append(f"{path}: {said[0]} -> {said[1]}")
    return out


# --- the command ------------------------------------------------------------------------------------------------------
def add_commands(commands: Any) -> None:
    """`config resolve` and `config diff` under the funczero command."""
    actions = commands.add_parser("config", help="say what a ds_config.json means here").add_subparsers(dest="action", required=True)
    one = actions.add_parser("resolve", help="every value with its origin, the batch, the chain, memory, and where DeepSpeed would do otherwise")
    one.add_argument("file", help="a ds_config.json")
    one.add_argument("--parameters", type=float, help="of the model, as 124e6: memory in MB")
    two = actions.add_parser("diff", help="the values that differ; the exit code is 1 when some do")
    two.add_argument("file", help="a ds_config.json")
    two.add_argument("other", help="another one")
    for p in (one, two):
        p.add_argument("--world", type=int, help="ranks that share the batch; default: WORLD_SIZE, or 1")
        p.add_argument(
            "--auto", action="append", default=[], metavar="KEY=VALUE", help='a value for a key that says "auto", as optimizer.params.lr=1e-4; may be repeated'
        )
    one.set_defaults(run=_resolve)
    two.set_defaults(run=_diff)


def _autos(given: list[str]) -> dict[str, Any]:
    out = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--auto={text}: it is no KEY=VALUE; write --auto=optimizer.params.lr=1e-4")
        out[key] = parsed(f"--auto={text}", f"{{x: {value}\n}}").raw["x"]
    return out


def _resolve(args: argparse.Namespace) -> int:
    print(explain(resolve(args.file, args.world, _autos(args.auto)), args.parameters))
    return 0


def _diff(args: argparse.Namespace) -> int:
    a, b = (resolve(f, args.world, {k: v for k, v in _autos(args.auto).items()}) for f in (args.file, args.other))
    lines = diff(a, b)
    print("\n".join(lines) if lines else f"{args.file} and {args.other} mean the same")
    return int(bool(lines))

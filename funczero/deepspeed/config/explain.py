"""`funczero config resolve` and `diff`: what a config says, what follows, and where DeepSpeed would do otherwise."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from funczero.comm.wire import as_born
from funczero.core import tree
from funczero.deepspeed.config.build import chain_of
from funczero.deepspeed.config.crossing import crossing
from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.optimizers import optimizer_of, rates_of
from funczero.deepspeed.config.reading import parsed
from funczero.deepspeed.config.resolve import resolve
from funczero.deepspeed.config.resolved import Config
from funczero.gradients.gradient import value_and_grad
from funczero.layout.spec import P
from funczero.step.train_step import train_step
from funczero.transforms.partition import Partition
from funczero.transforms.shares import Optimizer

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


def memory(config: Config, optimizer: Optimizer) -> list[Bytes]:
    """What a rank holds of every parameter above the stage's threshold, activations and messages aside.

    >>> page = {"train_batch_size": 8, "gradient_accumulation_steps": 4, "bf16": {"enabled": True},
    ...         "zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}
    >>> c = resolve(page, world=2)
    >>> [(b.what, b.each) for b in memory(c, optimizer_of(c))]
    [('masters', 2.0), ('views', 2.0), ('moments', 4.0), ('gradient as it is born', 2.0), ('accumulators', 6.0)]
    """
    stage, w, k = config.value("zero_optimization.stage"), config.world.size, config.triad.steps
    first = optimizer.parts[0].tx if isinstance(optimizer, Partition) else optimizer  # which has most of the values
    probe = first.init({"p": torch.zeros(8, 8)})
    moments = sum(x.numel() for x in tree.tensors(probe) if x.dim()) / 64
    compute, wide, how = config.compute, config.policy.rsplit("=", 1)[1], crossing(config)
    held = how.mesh["local"] if how.secondary else w  # ranks that parameters are split over at stage 3
    rows = [
        Bytes("masters", "float32", 1, w if stage else 1),
        Bytes("views", compute, int(stage in (1, 2) or compute != "float32" or held < w), held if stage == 3 else 1),
        Bytes("moments", "float32", moments, w if stage else 1),
        Bytes("gradient as it is born", compute, 1, held if stage == 3 else 1),
        Bytes("accumulators", wide, k.bit_length() if k > 1 else 0, (held if stage == 3 else w) if stage >= 2 else 1),
    ]
    return [b for b in rows if b.copies]


def differences(config: Config) -> list[str]:
    """Every place where DeepSpeed 0.19.8 would do otherwise with this config."""
    stage, fp16, kind = config.value("zero_optimization.stage"), config.block("fp16"), config.value("optimizer.type")
    half, many = config.compute != "float32", config.triad.steps * config.world.size > 1
    narrow_sums = half and many and config.value("data_types.grad_accum_dtype") is None
    untested = kind not in (None, *_TESTED) and stage > 0 and not config.value("zero_allow_untested_optimizer")
    dynamic, clip = fp16["enabled"] and not fp16["loss_scale"], config.values["gradient_clipping"]
    reads = "whole leaves" if str(kind).lower() in ("lamb", "adafactor") else "values by themselves"
    pieces = "a flattened leaf" if stage == 3 else "one flat buffer"
    rules = [
        (
            clip.origin == "default",
            (
                "gradient_clipping is absent and so 1.0: as there since June 2026, "
                "but older versions did not clip; write it"
            ),
        ),
        (narrow_sums, f"gradients are summed in float32 here, in {config.compute} there"),
        (
            many,
            "the loss is a sum divided by its weight once; there every micro-batch counts alike, whatever it weighs",
        ),
        (
            not half and stage == 0,
            "a gradient that is not finite skips the update; there it enters the weights",
        ),
        (
            fp16["enabled"] and stage == 0,
            "the loss is scaled; there, at stage 0, only the gradient is divided by the scale",
        ),
        (dynamic and stage == 0, "hysteresis counts and the floor raises; there, at stage 0, neither does"),
        (dynamic, "the update on which the scale doubles is whole; there it is halved"),
        (
            stage == 3,
            "leaves under stage3_param_persistence_threshold also keep whole moments; there those are split",
        ),
        (untested, f"{kind} runs under ZeRO, on {reads}; there it needs zero_allow_untested_optimizer"),
        (
            str(kind).lower() == "lamb" and stage > 0,
            "a leaf's norms are those of the whole leaf; there they are those of each rank's shard",
        ),
        (
            config.value("scheduler.type") is not None,
            (
                "after loading a checkpoint the rate is schedule(updates) at once; "
                "there it is the constructor's until the next step"
            ),
        ),
        *_crossings(config),
        (
            any(config.value(f"{kind}.enabled") for kind in ("tensorboard", "csv_monitor", "wandb")),
            "Train/Samples/train_loss is written, as earlier versions did; there only a pipeline module's engine does",
        ),
        (
            config.value("wall_clock_breakdown"),
            "a backward is one number, for gradients travel within it; there bwd_inner and bwd_allreduce are as well",
        ),
        (
            config.value("flops_profiler.enabled"),
            (
                "flops are counted by torch's own counter, the backward's, too; there elementwise operations count as"
                " well, the backward is taken for twice the forward, and every module has a latency"
            ),
        ),
        (
            config.value("comms_logger.enabled"),
            "bytes sent are printed by axis and wire; there every message's time and bandwidth are",
        ),
        (stage > 0, f"shards are rows of a leaf; there they are pieces of {pieces}"),
    ]
    return [text for holds, text in rules if holds]


def _crossings(config: Config) -> list[tuple[bool, str]]:
    """Where ZeRO++ differs."""
    how = crossing(config)
    return [
        (
            how.weights is not as_born,
            (
                f"weights travel as {how.weights}, whose blocks restart at every leaf; there blocks of up to 8000 run"
                " on, and the positive maximum of each loses 1/128"
            ),
        ),
        (
            how.gradients is not as_born,
            (
                f"gradients travel as {how.gradients} and are divided by the world once; there matrices come out as the"
                " mean times the ranks of a node, vectors as the mean, and sums are taken in float16"
            ),
        ),
        (
            how.secondary,
            (
                "gradients are summed over micro-batches within the group and cross groups once an update, as new"
                " parameters do; there every micro-batch's gradients cross"
            ),
        ),
    ]


_TESTED = ("Adam", "AdamW", "Adagrad", "adam", "adamw", "adagrad", "Lion", "lion", "Muon", "muon")


def explain(config: Config, parameters: float | None = None) -> str:
    """The resolved config as text: values with origins, the triad, the chain, memory, notes, differences.

    Args:
      parameters: of the model; with it bytes are totals.
    """
    wide, t = max(map(len, config.values)) + 2, config.triad
    product = f"{t.micro} a micro-batch * {t.steps} micro-batches * {config.world.size} ranks"
    lines = [*_values(config, wide), "", "batch", f"  {t.batch} rows an update = {product}", "", "chain"]
    try:
        tx = optimizer_of(config)
    except ConfigError as e:
        lines.append(f"  none: {e}")
    else:
        step = train_step(*chain_of(config, value_and_grad(_no_loss, P(crossing(config).axes)), tx), **config.arguments)
        lines += [*(f"  {x}" for x in str(step).splitlines()), *_rates(config)]
        lines += _memory(memory(config, tx), parameters, wide)
    lines += _section("notes", config.notes)
    return "\n".join([*lines, *_section("DeepSpeed would do otherwise", differences(config))])


def _values(config: Config, wide: int) -> list[str]:
    """What was given first, then the defaults."""
    lines = [f"{config.name} on {config.world.size} ranks ({config.world.origin})", "", "values"]
    for path, v in sorted(config.values.items(), key=lambda item: item[1].origin == "default"):
        lines.append(f"  {path:<{wide}}{_shown(v.value):<24}{v.origin}{f', line {v.line}' if v.line else ''}")
    return lines


def _memory(rows: list[Bytes], parameters: float | None, wide: int) -> list[str]:
    unit = "bytes a parameter" if parameters is None else f"MB for {parameters:,.0f} parameters"
    number = lambda x: f"{x:8.2f}" if parameters is None else f"{x * parameters / 1e6:12,.1f}"
    lines = ["", f"memory of a rank, in {unit}, without activations and messages"]
    for b in rows:
        over = f", over {b.over} ranks" if b.over > 1 else ""
        lines.append(f"  {f'{b.what} ({b.copies:g} in {b.dtype}{over})':<{wide}}{number(b.each)}")
    return [*lines, f"  {'in all':<{wide}}{number(sum(b.each for b in rows))}"]


def _no_loss(params: Any, batch: Any) -> Any:
    raise NotImplementedError


def _rates(config: Config) -> list[str]:
    lr, momentum = rates_of(config)
    points = (0, 1, 10, 100, 1000, 10000)

    def at(f: Any) -> str:
        return ", ".join(f"{f(torch.tensor(u)).item():.3g}" for u in points) if callable(f) else f"{f:.3g}"

    when = f" after {', '.join(map(str, points))} updates" if callable(lr) else ""
    rows = [] if lr is None else [f"  lr{when}: {at(lr)}"]
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
    config = commands.add_parser("config", help="say what a ds_config.json means here")
    actions = config.add_subparsers(dest="action", required=True)
    one = actions.add_parser(
        "resolve",
        help="every value with its origin, the batch, the chain, memory, and where DeepSpeed would do otherwise",
    )
    one.add_argument("file", help="a ds_config.json")
    one.add_argument("--parameters", type=float, help="of the model, as 124e6: memory in MB")
    two = actions.add_parser("diff", help="the values that differ; the exit code is 1 when some do")
    two.add_argument("file", help="a ds_config.json")
    two.add_argument("other", help="another one")
    for p in (one, two):
        p.add_argument("--world", type=int, help="ranks that share the batch; default: WORLD_SIZE, or 1")
        p.add_argument(
            "--auto",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help='a value for a key that says "auto", as optimizer.params.lr=1e-4; may be repeated',
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

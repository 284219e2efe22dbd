"""The flags that every experiment has; they are defined when one begins, not when something is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import flags

SUMS, WRITERS = ["tree", "exact", "backend"], ["csv", "tensorboard"]


class Flag(NamedTuple):
    """One flag: absl's kind of it, its default, what --help says, and its limits."""

    kind: Callable[..., Any]
    default: Any
    help: str
    limits: Mapping[str, Any] = {}


AT_LEAST_0, AT_LEAST_1 = {"lower_bound": 0}, {"lower_bound": 1}
TABLE: dict[str, Flag] = {
    "stage": Flag(
        flags.DEFINE_integer,
        3,
        "ZeRO stage: 0 shards nothing, 1 the optimizer's state, 2 also gradients, 3 also parameters.",
        {"lower_bound": 0, "upper_bound": 3},
    ),
    "mesh": Flag(
        flags.DEFINE_string,
        "",
        "Axes and sizes, outermost first, such as data=2 or node=2,local=2; -1: all that are left. Default: all"
        " processes on one axis.",
    ),
    "nproc": Flag(
        flags.DEFINE_integer,
        None,
        "Processes to start when no launcher has; default: for --mesh, or one an accelerator, or 2.",
        AT_LEAST_1,
    ),
    "threads": Flag(flags.DEFINE_integer, 1, "CPU threads of each process.", {"lower_bound": 1, "upper_bound": 1024}),
    "policy": Flag(
        flags.DEFINE_string,
        "float32",
        "Dtypes, one for all or params=float32,compute=bfloat16,accumulate=float32.",
    ),
    "sums": Flag(
        flags.DEFINE_enum,
        "tree",
        "How gradients are added; exact: one result on any number of ranks.",
        {"enum_values": SUMS},
    ),
    "debug": Flag(
        flags.DEFINE_bool,
        False,
        "Look for the first leaf of every skipped update that is not finite, and its rank; by default of few of them.",
    ),
    "batch": Flag(
        flags.DEFINE_integer,
        32,
        "{rows} in an update, over all processes; a multiple of processes x accumulate.",
        AT_LEAST_1,
    ),
    "accumulate": Flag(flags.DEFINE_integer, 1, "Micro-batches an update, in each process.", AT_LEAST_1),
    "micro_batch": Flag(
        flags.DEFINE_integer,
        None,
        "{rows} of a micro-batch, in place of --accumulate: as many as --batch has are dealt over the processes,"
        " whatever their number.",
        AT_LEAST_1,
    ),
    "steps": Flag(flags.DEFINE_integer, 100, "Updates.", AT_LEAST_1),
    "seed": Flag(flags.DEFINE_integer, 0, "Seed of the parameters, the batches and the run's draws.", AT_LEAST_0),
    "eval_every": Flag(
        flags.DEFINE_integer, 100, "Updates between two evaluations; also at the start and the end.", AT_LEAST_1
    ),
    "save_every": Flag(
        flags.DEFINE_integer,
        0,
        "Updates between two checkpoints in --out/checkpoints, also at the end and on SIGTERM and SIGUSR1; 0: none.",
        AT_LEAST_0,
    ),
    "resume": Flag(
        flags.DEFINE_string,
        "never",
        "auto: from the last checkpoint where there is one; a number: from that update's; never.",
    ),
    "keep": Flag(flags.DEFINE_integer, 3, "Checkpoints that stay.", AT_LEAST_1),
    "write": Flag(
        flags.DEFINE_list,
        [],
        f"Writers beside metrics.jsonl, separated by commas, of {' and '.join(WRITERS)}: folders of --out.",
    ),
    "out": Flag(
        flags.DEFINE_string,
        "runs/{script}",
        "Folder for metrics.jsonl (a line an update), loss.png and what the processes write to stderr (rank0.log,"
        " ...).",
    ),
}


def define(script: str, rows: str, defaults: Mapping[str, Any], among: flags.FlagValues = flags.FLAGS) -> None:
    """Defines all flags of the table, under the script in --help; a second time only their defaults.

    Args:
      script: its name, for --out.
      rows: what a row of a batch is called there.
      defaults: other defaults by flag.
      among: where they are defined.

    Raises:
      TypeError: a default is of no such flag.
      absl.flags.DuplicateFlagError: the script has defined one of them itself.
    """
    odd = next((name for name in defaults if name not in TABLE), None)
    if odd is not None:
        known = ", ".join(TABLE)
        raise TypeError(f"experiment: {odd}= is the default of no flag; those of an experiment are {known}")
    for name, (kind, default, said, limits) in TABLE.items():
        value = defaults.get(name, default.format(script=script) if name == "out" else default)
        said = said.format(rows=rows.capitalize())
        if name in among and among[name].help == said:
            among.set_default(name, value)
        else:
            kind(name, value, help=said, flag_values=among, module_name=sys.argv[0], **limits)

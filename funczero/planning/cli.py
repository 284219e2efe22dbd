"""`funczero plan`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from funczero.core.types import ChainError
from funczero.planning import sources
from funczero.planning.explain import explained
from funczero.planning.model import Machine, machine_of
from funczero.planning.plan import plan
from funczero.planning.search import WIRES, Candidate, ranked, search_plans
from funczero.planning.words import size

WHAT = (
    "a .py file or a module with make_step(stage=, accumulate=) -> (step, params) and make_batch(t), as for parity; or"
    " a config.json of Hugging Face, or a folder that holds one"
)


def add(commands: Any) -> None:
    """The subcommand."""
    text = "bytes of memory and on the wire, and seconds, of an update on any mesh, before it runs"
    p = commands.add_parser("plan", help=text, description=text)
    p.add_argument("what", help=WHAT)
    p.add_argument("--mesh", default="data=1", help="ranks by axis, outermost first: data=64, or node=8,local=8")
    p.add_argument("--stage", type=int, choices=range(4), help="ZeRO stage; 3 by default")
    p.add_argument("--accumulate", help="micro-batches a rank, 1 by default; with --search several: 1,2,4")
    p.add_argument("--rows", type=int, help="of a micro-batch; by default 1, or what make_batch or the config gives")
    p.add_argument(
        "--length", type=int, help="tokens of a row, for a config of Hugging Face; 1024 by default, or all positions"
    )
    p.add_argument("--policy", help="dtypes, for a config of Hugging Face: params=float32,compute=bfloat16")
    p.add_argument("--ds_config", metavar="FILE", help="the chain of a ds_config.json, for a config of Hugging Face")
    p.add_argument("--link", help="rate and latency of a rank's link by axis: node=100Gbit/10us,local=400Gbit/2us")
    p.add_argument("--flops", help="of a rank: 300T, or with memory's rate and a cost an operation: 300T,2TB,5us")
    p.add_argument("--memory", help="of a rank: 24GiB; then the exit code is 1 where it does not fit")
    p.add_argument("--rank", type=int, help="whose plan; 0 by default")
    p.add_argument("--no_batch", action="store_true", help="leave out activations and FLOPs: a large model in seconds")
    p.add_argument("--explain", action="store_true", help="what a rank does, line by line")
    p.add_argument("--search", action="store_true", help="stages, brackets, wires and accumulates for that memory")
    p.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    try:
        return _planned(args)
    except TypeError as error:  # a refusal by name is one sentence here; anything else is a mistake of ours
        if isinstance(error, ChainError) or str(error).startswith("plan:"):
            raise ValueError(str(error).splitlines()[0]) from None
        raise


def _planned(args: argparse.Namespace) -> int:
    _refuse(args)
    mesh, ks = mesh_of(args.mesh), _numbers("1" if args.accumulate is None else args.accumulate)
    memory = None if args.memory is None else size(args.memory)
    machine = None if args.flops is None else machine_of(args.flops)
    if args.search:
        return _search(args, mesh, ks, memory, machine)
    if len(ks) > 1:
        raise ValueError(f"plan: --accumulate={args.accumulate!r} are several; write one, or --search")
    step, params, batch = _step(args, mesh, ks[0])
    found = plan(step, params, batch, mesh, args.link, machine, args.rank or 0)
    print(found)
    if args.explain:
        print(explained(found))
    fits = memory is None or found.memory.peak <= memory
    if not fits:
        print(f"the peak is over {args.memory}; funczero plan ... --search --memory={args.memory} says what fits")
    return 0 if fits else 1


# what each of these leaves nothing to say: another argument would be passed over in silence
SETTLES = {
    "search": (("stage", "rank", "explain", "ds_config"), "--search makes its own chains and plans rank 0"),
    "ds_config": (("stage", "accumulate", "policy"), "the ds_config.json says its own"),
    "python": (("ds_config", "policy", "length"), "it is for a config of Hugging Face, and a file says its own"),
}


def _refuse(args: argparse.Namespace) -> None:
    """Refuse arguments that would change nothing, and numbers that are none.

    Raises:
      ValueError: with the argument.
    """
    here = {"search": args.search, "ds_config": args.ds_config, "python": _is_python(args.what)}
    for name, (others, why) in SETTLES.items():
        said = (x for x in others if here[name] and getattr(args, x) is not None and getattr(args, x) is not False)
        odd = next(said, None)
        if odd is not None:
            raise ValueError(f"plan: --{odd} would change nothing here, because {why}; leave it out")
    for name in ("rows", "length"):
        n = getattr(args, name)
        if n is not None and n < 1:
            raise ValueError(f"plan: --{name}={n} is below 1; write a whole number of at least 1")


def _step(args: argparse.Namespace, mesh: dict[str, int], k: int) -> tuple[Any, Any, Any]:
    """The step, its parameters and a global batch of what was named."""
    stage = 3 if args.stage is None else args.stage
    if _is_python(args.what):
        own = sources.built(args.what)
        step, params = own.make(stage, k)
        batch = own.batch if args.rows is None else _rows(args, own.batch, step, mesh)
        return step, params, None if args.no_batch else batch
    model = sources.hugging(args.what, args.length)
    rows = args.rows or 1
    if args.ds_config:
        step, rows = sources.step_of_ds(args.ds_config, model, mesh)
        if args.rows not in (None, rows):
            raise ValueError(
                f"plan: --rows={args.rows}, but a micro-batch of {args.ds_config} has {rows}; leave it out"
            )
    else:
        step = sources.step_of(model, mesh, stage, k, args.policy)
    batch = model.rows(rows * sources.micros_of(step, mesh))
    return step, model.params, None if args.no_batch else batch


def _rows(args: argparse.Namespace, batch: Any, step: Any, mesh: dict[str, int]) -> Any:
    return sources.of_rows(batch, args.rows * sources.micros_of(step, mesh), step.grad.layout.cut)


def _search(
    args: argparse.Namespace, mesh: dict[str, int], ks: list[int], memory: int | None, machine: Machine | None
) -> int:
    """Of a file its stages and accumulates; of a model brackets and wires, too."""
    if _is_python(args.what):
        own = sources.built(args.what)
        first, params = own.make(0, 1)
        make = lambda stage, k: (lambda: own.make(stage, k)[0])
        every = [Candidate(f"ZeRO-{s}", "its own", k, make(s, k)) for k in ks for s in range(4)]
        places, cut = _places(mesh, ks, first.source.batch), first.grad.layout.cut
        batch = own.batch if args.rows is None else sources.of_rows(own.batch, args.rows * places, cut)
        found = ranked(every, params, None if args.no_batch else batch, mesh, memory, args.link, machine)
    else:
        model = sources.hugging(args.what, args.length)
        batch = None if args.no_batch else model.rows((args.rows or 1) * _places(mesh, ks, tuple(mesh)))
        parts = (sources.clip_by_global_norm(1.0), sources.adamw(1e-4))
        found = search_plans(
            sources.source_of(model, tuple(mesh)), *parts, params=model.params, mesh=mesh, batch=batch, memory=memory,
            link=args.link, machine=machine, policy=args.policy, accumulate=ks, wires=tuple(WIRES),
        )  # fmt: skip
    print(found)
    return 0 if found.best is not None else 1


def _places(mesh: dict[str, int], ks: list[int], axes: tuple[str, ...]) -> int:
    """Micro-batches of the update that all accumulates divide, of the largest, where these axes split the batch."""
    return max(ks) * sources.prod(n for axis, n in mesh.items() if axis in axes)


def _is_python(what: str) -> bool:
    """Is it a file or a module that builds a step? A folder with a point in its name is one of Hugging Face."""
    if what.endswith(".py") or Path(what).exists() or "/" in what or what.endswith(".json"):
        return what.endswith(".py")
    return "." in what or what.isidentifier() and find_spec(what) is not None


def mesh_of(text: str) -> dict[str, int]:
    """Sizes by axis.

    >>> mesh_of("node=8,local=4")
    {'node': 8, 'local': 4}
    """
    out: dict[str, int] = {}
    for part in text.split(","):
        axis, _, n = part.strip().partition("=")
        if not axis.isidentifier() or not n.isdigit() or int(n) < 1 or axis in out:
            raise ValueError(f"plan: --mesh={text!r} is no mesh; write its axes and sizes, as node=8,local=8")
        out[axis] = int(n)
    return out


def _numbers(text: str) -> list[int]:
    parts = [x.strip() for x in text.split(",")]
    if not all(x.isdigit() and int(x) for x in parts):
        raise ValueError(f"plan: --accumulate={text!r} is no list of numbers; write 4, or 1,2,4")
    return [int(x) for x in parts]

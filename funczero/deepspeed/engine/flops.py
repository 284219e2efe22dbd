"""What flops_profiler prints: the arithmetic of one micro-batch, counted, and how fast it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from funczero.deepspeed.config.resolved import Config
from funczero.deepspeed.engine.log import logger

NOTES = (
    (
        "flops are those of torch's own counter (products of matrices, convolutions, attention), a multiply-accumulate"
        " as two; what only moves or adds elements counts as none"
    ),
    "the backward's are counted, and not two or three times the forward's; blocks that run again in it are among them",
    "latencies are the last update's before the count, which is slow; a module has none of its own here (fz.profile)",
)


class Sizes(NamedTuple):
    """What an engine says of itself, for the table's head."""

    world_size: int
    rows: int  # of a micro-batch on a rank
    micros: int  # of an update on a rank
    held: int  # parameters that this rank keeps between updates
    whole: int  # of the model


class Part(NamedTuple):
    """A module of the model."""

    path: str  # "" for all of it
    kind: str
    depth: int
    params: int
    flops: int


class Flops:
    """Counts one forward and one backward of rank 0, where the config asks for it, and prints them at the update's end.

    Law: an update that is counted has the bits of one that is not.

    Source: DeepSpeed 0.19.8, profiling/flops_profiler/profiler.py: its keys, and what its users look for.
    """

    def __init__(self, config: Config, rank: int) -> None:
        """Nothing is counted yet."""
        ask = lambda key: config.value(f"flops_profiler.{key}")
        self.on: bool = ask("enabled") and rank == 0
        self._at, self._depth, self._top = ask("profile_step"), ask("module_depth"), ask("top_modules")
        self._detailed, self._file = ask("detailed"), ask("output_file")
        self._counters: dict[str, FlopCounterMode] = {}

    @property
    def counted(self) -> bool:
        """Is there something to print at the end of this update?"""
        return bool(self._counters)

    def of(self, moment: str, updates: Callable[[], int]) -> AbstractContextManager[Any]:
        """While a micro-batch's forward ("fwd") or backward ("bwd") runs; the first one of its update is counted."""
        if not self.on or moment in self._counters:
            return nullcontext()
        now = updates()
        if now > self._at:  # a run that was resumed
            self.on = False
            logger.info("flops profiler: nothing is counted, because update %d is past; this is %d", self._at, now)
        return self._counting(moment) if now == self._at else nullcontext()

    @contextmanager
    def _counting(self, moment: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        self._counters[moment] = counter  # whole: it did not end in an error

    def updated(self, module: nn.Module, sizes: Sizes, latencies: dict[str, float]) -> None:
        """An update has ended: what it counted is printed, once.

        Args:
          latencies: milliseconds of the update before, by moment; none before the first.
        """
        self.on = False
        forward, backward = (self._counters.get(moment) for moment in ("fwd", "bwd"))
        flops = [0 if c is None else c.get_total_flops() for c in (forward, backward)]
        parts = list(_parts(module, {} if forward is None else forward.get_flop_counts()))
        lines = [f"flops profiler: update {self._at}, one micro-batch of rank 0", *NOTES, ""]
        lines += _head(sizes, flops, latencies)
        lines += ["", "by depth, the modules with the most:", *self._by_depth(parts)]
        if self._detailed:
            lines += ["", "by module:", *(_row(p, parts[0]) for p in parts if self._deep(p.depth))]
        self._counters = {}
        text = "\n".join(lines) + "\n"
        if self._file:
            Path(self._file).absolute().parent.mkdir(parents=True, exist_ok=True)
            Path(self._file).write_text(text, encoding="utf-8")
        else:
            logger.info("%s", text)

    def _deep(self, depth: int) -> bool:
        return self._depth < 0 or depth <= self._depth

    def _by_depth(self, parts: list[Part]) -> Iterable[str]:
        for depth in range(1 + max(p.depth for p in parts)):
            if self._deep(depth):
                here = [p for p in parts if p.depth == depth]
                for what in ("params", "flops"):
                    most = sorted(here, key=lambda p: -getattr(p, what))[: self._top]
                    said = ", ".join(f"{p.path or p.kind} {amount(getattr(p, what))}" for p in most)
                    yield f"  depth {depth}, {what}: {said}"


def _parts(module: nn.Module, counts: dict[str, dict[Any, int]]) -> Iterable[Part]:
    """Every module, from the outside inwards."""
    root, found = type(module).__name__, {"": sum(counts.get("Global", {}).values())}
    for path, m in reversed([x for x in module.named_modules() if x[0]]):
        inside = sum(found.get(f"{path}.{name}", 0) for name, _ in m.named_children())
        called = counts.get(f"{root}.{path}")  # a list of blocks is not
        found[path] = inside if called is None else sum(called.values())
    for path, m in module.named_modules():
        params = {id(p): elements(p) for p in m.parameters()}
        yield Part(path, type(m).__name__, path.count(".") + bool(path), sum(params.values()), found[path])


def _head(sizes: Sizes, flops: list[int], latencies: dict[str, float]) -> Iterable[str]:
    """Numbers of the whole model, one a line."""
    forward, backward = flops
    say = lambda name, value: f"{name:60} {value}"
    yield say("world size, which is the data parallel size", sizes.world_size)
    yield say("batch size per GPU (rows of a micro-batch)", sizes.rows)
    yield say("micro-batches of an update per GPU", sizes.micros)
    yield say("params per GPU (kept between updates, padding included)", amount(sizes.held))
    yield say("params of model", amount(sizes.whole))
    yield say("fwd MACs per GPU", amount(forward / 2))
    yield say("fwd flops per GPU", amount(forward))
    yield say("bwd flops per GPU", amount(backward))
    if not latencies:
        yield "latencies: none, because this is the first update; write profile_step: 1 or more"
        return
    seconds = {moment: ms / 1e3 for moment, ms in latencies.items()}
    fwd, bwd, whole = (sizes.micros * forward, sizes.micros * backward, sum(seconds.values()))
    for moment, many in (("fwd", fwd), ("bwd", bwd), ("step", 0)):
        yield say(f"{moment} latency of an update", f"{1e3 * seconds[moment]:.2f} ms")
        if many:
            yield say(f"{moment} FLOPS per GPU", f"{amount(many / seconds[moment])}FLOPS")
    yield say("iter latency (fwd + bwd + step)", f"{1e3 * whole:.2f} ms")
    yield say("FLOPS per GPU", f"{amount((fwd + bwd) / whole)}FLOPS")
    yield say("samples/second", f"{sizes.world_size * sizes.micros * sizes.rows / whole:.2f}")


def _row(part: Part, whole: Part) -> str:
    share = lambda x, of: f"{100 * x / of:.1f} %" if of else "0 %"
    name = "  " * part.depth + (part.path.rpartition(".")[2] or part.kind)
    name += f" ({part.kind})" * bool(part.path)
    params, flops = share(part.params, whole.params), share(part.flops, whole.flops)
    return f"  {name:50} params {amount(part.params)} ({params}), fwd flops {amount(part.flops)} ({flops})"


def elements(p: Any) -> int:
    """Of a whole parameter, also where it is closed."""
    return int(getattr(p, "ds_numel", None) or p.numel())


def amount(x: float) -> str:
    """A number in a person's size.

    >>> amount(0), amount(999), amount(1234567), amount(5e12)
    ('0 ', '999 ', '1.23 M', '5 T')
    """
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if x >= size:
            return f"{x / size:.3g} {prefix}"
    return f"{x:.3g} "

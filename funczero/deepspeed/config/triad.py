"""The batch triad: train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * world size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from funczero.deepspeed.config.key import ConfigError

BATCH, MICRO, STEPS = NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


Given = tuple[int | None, int | None, int | None]


class WorldSize(NamedTuple):
    """How many ranks share the batch, and who said so."""

    size: int
    origin: str


class Triad(NamedTuple):
    """Rows of an update, rows of a micro-batch on one rank, micro-batches a rank takes for an update."""

    batch: int
    micro: int
    steps: int

    @property
    def weight(self) -> float:
        """The power of two near the micro-batches of an update, by which a loss scale is divided."""
        return 2.0 ** round(math.log2(self.steps))


def derive(batch: int | None, micro: int | None, steps: int | None, world: WorldSize, where: str = "") -> Triad:
    """The triad from any of its numbers, by DeepSpeed's rules; what is missing is derived, what cannot be is refused.

    Law: batch == micro * steps * world, all positive.

    Args:
      batch, micro, steps: the three keys, None where absent.
      world: ranks that share the batch.
      where: the file and line, for messages.

    Raises:
      ConfigError: with all numbers, where the world size came from, and two corrections (`fixes`), each of them valid.

    >>> derive(32, 4, None, WorldSize(2, "given"))
    Triad(batch=32, micro=4, steps=4)
    """
    given, n = (batch, micro, steps), world.size
    found = _solved(given, n)
    if found is not None:
        return found
    numbers = ", ".join(f"{name}={'absent' if x is None else x}" for name, x in zip(NAMES, given, strict=True))
    fixes = [
        fix
        for fix in _candidates(given, n)
        if _solved((fix.get(BATCH, batch), fix.get(MICRO, micro), fix.get(STEPS, steps)), n)
    ]
    two = [fix for i, fix in enumerate(fixes) if fix not in fixes[:i]][:2]
    said = ", or ".join(
        " and ".join(f"leave {k} out" if v is None else f"{k}={v}" for k, v in fix.items()) for fix in two
    )
    raise ConfigError(f"{where}{_why(given, n)} ({numbers}, world size {n}: {world.origin}); write {said}", two)


def _solved(given: Given, n: int) -> Triad | None:
    batch, micro, steps = given
    if any(x is not None and x < 1 for x in (batch, micro, steps)) or (batch is None and micro is None):
        return None
    if batch is None:
        assert micro is not None
        return Triad(micro * (steps or 1) * n, micro, steps or 1)
    if micro is None:
        found = Triad(batch, batch // ((steps or 1) * n), steps or 1)
    else:
        found = Triad(batch, micro, batch // (micro * n) if steps is None else steps)
    return found if found.micro * found.steps * n == batch else None


def _why(given: Given, n: int) -> str:
    batch, micro, steps = given
    low = next((name for name, x in zip(NAMES, given, strict=True) if x is not None and x < 1), None)
    if low:
        return f"{low}: it is not at least 1"
    if batch is None:
        return f"{BATCH}: neither it nor {MICRO} is there, and there is no default batch"
    if micro is not None and steps is not None:
        return f"{BATCH}: {batch} is not {micro} * {steps} * {n} = {micro * steps * n}"
    return f"{BATCH}: {batch} rows do not divide by {' * '.join(str(x) for x in (micro, steps, n) if x is not None)}"


def _candidates(given: Given, n: int) -> Iterator[dict[str, Any]]:
    """Corrections, the smallest change first; the caller keeps those that hold."""
    batch, micro, steps = (x if x is None or x > 0 else None for x in given)
    m, k = micro or 1, steps or 1
    bad: dict[str, Any] = {name: 1 for name, x in zip(NAMES, given, strict=True) if x is not None and x < 1}
    unit = m * k * n
    whole = unit * (batch // unit) if batch else 0
    if micro and steps and not bad:
        yield {BATCH: unit}
    if batch:
        yield {STEPS: batch // (m * n)}
        yield {MICRO: batch // (k * n)}
        yield {BATCH: max(whole, unit)}
        yield {BATCH: whole + unit}
    elif not bad:
        yield {MICRO: 1}
    yield bad or {BATCH: unit}
    yield {name: 2 * x for name, x in bad.items()} or {BATCH: 2 * unit}
    yield bad | {BATCH: unit}
    yield bad | {BATCH: 2 * unit, STEPS: 2 * k}

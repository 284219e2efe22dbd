"""Seconds: a small model of links and of arithmetic, over what a step does in order.

- A message over an axis of W ranks takes latency + bytes / speed, where the bytes are those that this rank sends; the
  messages of one link wait for each other, and those of different links do not. Over several axes at once the slowest
  link counts.
- An operation takes the largest of flops / rate and bytes / bandwidth that its stretch of the step has, and a fixed
  cost each.
- Computing goes on while a message travels, until the step waits for it. That is the overlap: program order is the
  schedule, and nothing else hides anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from funczero.core.link import Link
from funczero.core.number import number, shown
from funczero.planning.trace import Verb
from funczero.planning.words import duration

RATES = {"bit": 0.125, "B": 1.0, "byte": 1.0}
PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
A_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
NUMBER, MANY = r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)", r"\s*([kKmMgGtTpP]?)"
LINK = re.compile(rf"{NUMBER}{MANY}(bit|B|byte)(?:/s)?/{NUMBER}\s*(s|ms|us|ns)")
# what each part of an arithmetic is told by: its unit
ARITHMETIC = {
    "flops": re.compile(rf"{NUMBER}{MANY}(?:flops?|FLOPS?)?(?:/s)?"),
    "bandwidth": re.compile(rf"{NUMBER}{MANY}(?:B|byte)(?:/s)?"),
    "operation": re.compile(rf"{NUMBER}\s*(s|ms|us|ns)"),
}


class Machine(NamedTuple):
    """What a rank computes with; a rate of 0 takes no time."""

    flops: float = 0.0  # a second
    bandwidth: float = 0.0  # bytes a second that operations read and write
    operation: float = 0.0  # seconds each, whatever its size


class Seconds(NamedTuple):
    """Of one update; what was hidden is the time of messages less the time that the step waited for them."""

    update: float
    compute: float
    messages: dict[str, float]  # by axis, as if one after another
    waited: dict[str, float]  # by axis: of that, what the step waited for

    def __str__(self) -> str:
        parts = []
        for axis, busy in self.messages.items():
            hidden = 1 - self.waited.get(axis, 0.0) / busy if busy else 0.0
            parts.append(f"{axis} {duration(busy)}, {max(hidden, 0.0):.0%} hidden")
        return f"{duration(self.update)} an update: compute {duration(self.compute)}; " + "; ".join(
            parts or ["no message"]
        )


def links_of(
    said: str | Mapping[str, Link] | None, axes: Mapping[str, int], machine: object = None
) -> dict[str, Link] | None:
    """Links by mesh axis; None: no seconds are asked for.

    Args:
      machine: what a rank computes with, if that is said: its seconds need the links', too.

    Raises:
      ValueError: an axis is not on the mesh, or has no link; what is written is none.
      TypeError: a link is no Link, or its numbers are none.

    >>> links_of("node=100Gbit/10us,local=8GB/2us", {"node": 2, "local": 4})["local"]
    Link(latency=2e-06, speed=8000000000.0)
    """
    if said is None and machine is None:
        return None
    said = {} if said is None else said
    if not isinstance(said, (str, Mapping)):
        what = f"plan: link={shown(said)} is no link of an axis"
        raise TypeError(f"{what}; write link={{{next(iter(axes), 'data')!r}: fz.Link(...)}}, or 'data=100Gbit/10us'")
    found = _links(said) if isinstance(said, str) else {axis: _checked(axis, link) for axis, link in said.items()}
    odd = next((a for a in found if a not in axes), None)
    if odd is not None:
        raise ValueError(f"plan: --link names {odd!r}, which is no axis of the mesh; write one of {list(axes)}")
    missing = next((a for a, n in axes.items() if n > 1 and a not in found), None)
    if missing is not None:
        raise ValueError(f"plan: --link says nothing of the axis {missing!r}; write {missing}=100Gbit/10us too")
    return found


def _checked(axis: str, link: Link) -> Link:
    if not isinstance(link, Link):
        raise TypeError(f"plan: the link of {axis!r} is {shown(link)}; write fz.Link(latency=10e-6, speed=12.5e9)")
    return link.checked(f"plan: link of {axis!r}")


def _links(text: str) -> dict[str, Link]:
    out: dict[str, Link] = {}
    for part in text.split(","):
        axis, _, rest = (x.strip() for x in part.partition("="))
        found = LINK.fullmatch(rest)
        if not axis or not found or float(found[1]) <= 0:
            raise ValueError(f"plan: --link={part.strip()!r} is no link; write axis=rate/latency, as node=100Gbit/10us")
        if axis in out:
            raise ValueError(f"plan: --link={text!r} has two links of {axis!r}; write one")
        rate = float(found[1]) * PREFIX[found[2].lower()] * RATES[found[3]]
        out[axis] = Link(float(found[4]) / A_SECOND[found[5]], rate)
    return out


def machine_of(text: str) -> Machine:
    """Arithmetic as "10T" or "10Tflops,200GB,5us": FLOPs a second, memory's bytes a second, seconds an operation.

    Each is told by its unit, and what is not written takes no time.

    Raises:
      ValueError: it is none.

    >>> machine_of("10T,200GB,5us")
    Machine(flops=10000000000000.0, bandwidth=200000000000.0, operation=5e-06)
    """
    out = dict[str, float]()
    for part in text.split(","):
        matches = ((what, form.fullmatch(part.strip())) for what, form in ARITHMETIC.items())
        what, found = next(((what, found) for what, found in matches if found), ("", None))
        if found is None or what in out or float(found[1]) <= 0:
            raise ValueError(f"plan: --flops={text!r} is no arithmetic; write 10T, or 10T,200GB,5us")
        seconds, n = what == "operation", float(found[1])
        out[what] = n / A_SECOND[found[2]] if seconds else n * PREFIX[found[2].lower()]
    return Machine(**out)


def works_of(machine: object) -> Machine:
    """What a rank computes with, as plan is told it; None: nothing takes time.

    Raises:
      TypeError, ValueError: it is none.
    """
    if machine is None or isinstance(machine, str):
        return Machine() if machine is None else machine_of(machine)
    if not isinstance(machine, Machine):
        raise TypeError(f"plan: machine={shown(machine)} is no machine; write '300T,2TB,5us'")
    parts = machine._asdict().items()
    return Machine(*(number("plan: machine", name, x) for name, x in parts))


def seconds_of(verbs: Sequence[Verb], links: Mapping[str, Link], machine: Machine) -> Seconds:
    """Goes through a step in order, with a clock for the rank and one for each link."""
    now = compute = 0.0
    free, done = dict.fromkeys(links, 0.0), dict[int, float]()
    busy, waited = dict[str, float](), dict[str, float]()
    for i, verb in enumerate(verbs):
        if verb.what == "compute":
            took = _work(verb, machine)
            now, compute = now + took, compute + took
        elif verb.what == "wait":
            stalled = max(done.get(verb.of, now) - now, 0.0)
            now, waited[verb.axis] = now + stalled, waited.get(verb.axis, 0.0) + stalled
        else:
            over = [a for a in verb.axis.split("+") if a in links]
            took = max((links[a].latency + verb.nbytes / links[a].speed for a in over), default=0.0)
            begun = max([now, *(free[a] for a in over)])
            done[i] = begun + took
            free |= dict.fromkeys(over, done[i])
            busy[verb.axis] = busy.get(verb.axis, 0.0) + took
    return Seconds(now, compute, busy, waited)


def _work(verb: Verb, machine: Machine) -> float:
    arithmetic = verb.flops / machine.flops if machine.flops else 0.0
    memory = verb.moved / machine.bandwidth if machine.bandwidth else 0.0
    return max(arithmetic, memory) + verb.operations * machine.operation

"""The sentence where ranks differ: who is odd, where, what the others do, and what to write instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from funczero.world.entries import BEGINS, GIVEN, RETURNED, UPDATE, Context, Entry

DO_THE_SAME = "every rank must make the same calls, and no branch of the loss may depend on the rank or on its rows"


def first_difference(tails: dict[int, list[Entry]], texts: dict[int, str]) -> str:
    """The sentence for entries by rank that begin at the same launch; "" where they are all alike."""
    if len(tails) < 2:
        return ""
    for n in range(min(map(len, tails.values()))):
        entries = {r: tail[n] for r, tail in sorted(tails.items())}
        if len({e.compared for e in entries.values()}) > 1:
            return sentence(entries, texts.get)
    lengths = {len(tail) for tail in tails.values()}
    if len(lengths) == 1:
        return ""
    n = min(lengths)  # one launched nothing more: it stands in the sum already
    ends = {
        r: tail[n] if len(tail) > n else tail[-1] if tail else Entry(Context("no call"), "nothing", text="nothing")
        for r, tail in sorted(tails.items())
    }
    return sentence(ends, texts.get) if len({e.compared for e in ends.values()}) > 1 else ""


def sentence(entries: dict[int, Entry], text_of: Callable[[int], str | None], peer: int = 0) -> str:
    """Who is odd, where, what the others do, and what to change; entries by rank, not all alike."""
    found = Counter(e.compared for e in entries.values())
    # what most do; of two, the plainer
    usual = max(entries.values(), key=lambda e: (found[e.compared], not e.text, e.context.call == UPDATE))
    odd = next((r for r, e in entries.items() if e.compared != usual.compared), peer)
    others = ranks_in_words([r for r, e in entries.items() if e.compared == usual.compared])
    return f"rank {odd} {_difference(entries[odd], usual, others)}; {_remedy(entries[odd], usual, text_of)}"


def _difference(odd: Entry, usual: Entry, others: str) -> str:
    a, b = odd.context, usual.context
    if odd.verb == usual.verb == BEGINS and a.spec != b.spec:
        return f"begins with another chain or other leaves than {others}"
    if (
        odd.verb == usual.verb
        and odd.verb in (BEGINS, GIVEN)
        and odd.axis == usual.axis
        and a.spec == b.spec
        and odd.compared[5:] != usual.compared[5:]
    ):
        instead = f": {odd.dtype} instead of {usual.dtype}" * (odd.dtype != usual.dtype)
        at = f" at step {a.step}" * (odd.verb == GIVEN)
        return f"{odd.verb} another value of {odd.axis} than {others}{at}{instead}"
    if (a.call, a.step, a.spec) == (b.call, b.step, b.spec) and not odd.text and not usual.text:
        differing = [
            (n, x, y)
            for n, x, y in zip(("the key", *a.names), (a.key, *a.scalars), (b.key, *b.scalars), strict=False)
            if x != y
        ]
        if differing:
            name, x, y = differing[0]
            return (
                f"has {x} as {name} in {a.call} at step {a.step}, while {others}"
                f" ha{'ve' if others.startswith('ranks') else 's'} {y}"
            )
    return f"{odd}, while {others} {usual}"


def _remedy(odd: Entry, usual: Entry, text_of: Callable[[int], str | None]) -> str:
    """What to write instead."""
    gone, there = (odd, usual) if odd.text else (usual, odd)
    a, b = odd.context, usual.context
    if gone.text and not gone.text.startswith(("after", "nothing")):
        return "an error on one rank ends all"
    if gone.text:
        return (
            "every rank must make as many calls of"
            f" {there.context.call}{': give every rank as many batches' * (there.context.call == UPDATE)}"
        )
    if a.spec != b.spec:
        one, many = ((text_of(c.spec) or "").split("\n") + [""] for c in (a, b))
        x, y = next(((x, y) for x, y in zip(one, many, strict=False) if x != y), ("", ""))
        return f"every rank must build the same chain from like parameters, but one has {x!r} where others have {y!r}"
    if a.call != b.call:
        return f"every rank must make the same calls: {a.call if a.call != UPDATE else b.call} on all ranks or on none"
    if odd.verb == GIVEN:
        return (
            "what batch= calls P() is whole, and the same on all ranks: give every rank the same, or split it into rows"
            " with P(...)"
        )
    if odd.verb == RETURNED:
        return "what a loss returns beside its sums is added and joined by its place: return one form on every rank"
    if odd.verb == BEGINS:
        return (
            "every rank must begin alike: give init the same parameters (fz.init draws them leaf by leaf from one key)"
            " and the same key, under one torch and as many threads"
        )
    if (a.step, a.key, a.scalars) != (b.step, b.key, b.scalars):
        return (
            "every rank must hold the same state and rates: restore the same checkpoint, make as many updates, and let"
            " no schedule depend on the rank"
        )
    if odd.units != usual.units and (odd.verb == usual.verb or "all_gather" in (odd.verb, usual.verb)):
        return (
            "where parameters rest in shards every rank must open the same units in the same order; where that depends"
            " on its rows, name their list: value_and_grad(..., conditional=[...]) or fz.stateless(...,"
            " conditional=[...])"
        )
    return "every rank must launch the same collectives: no branch of the loss may depend on the rank or on its rows"


def ranks_in_words(ranks: list[int]) -> str:
    """rank 3; ranks 0, 1, 2."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"

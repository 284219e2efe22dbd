"""The rates among the leaves of a restore: what the script says of them, and what the checkpoint does."""

from __future__ import annotations

import math

from funczero.checkpoint.names import Part
from funczero.core.types import TrainState


class ScriptRates:
    """The rates among the leaves that are restored: what the script says of them, and what the checkpoint does.

    The checkpoint's value counts, and a script that says another is told. One that the checkpoint lacks comes from the
    script.
    """

    def __init__(self, like: TrainState, parts: dict[str, Part], given: dict[str, Part]) -> None:
        """parts: the rates that are restored; given: the leaves of `like`, whose rates are never on the meta device."""
        self.parts = parts
        self.said = {n: float(given[n].value) for n in parts}
        # later a schedule's leaf is what it last wrote, and nobody's word
        self.fresh = like.updates.is_meta or not int(like.updates)

    def settled(self, read: set[str]) -> list[str]:
        """Fill in what was not read; notes on what the script and the checkpoint do not have alike."""
        lacks, notes = [], []
        for name, part in self.parts.items():
            said = self.said[name]
            kept = float(part.value) if name in read else math.nan
            if kept != kept:  # not there, or saved before a schedule wrote it
                part.value.fill_(said)
                lacks += [f"{name} = {said!r}"] if said == said else []
            elif self.fresh and said == said and kept != said:
                notes.append(
                    f"{name!r} is {kept!r} in the checkpoint, which counts, and {said!r} in the script; write another"
                    " value into the restored state"
                )
        return [f"the checkpoint says nothing of these rates, which come from the script: {', '.join(lacks)}"] * bool(
            lacks
        ) + notes

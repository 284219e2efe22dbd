"""What a Trainer's chain is, by arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from funczero.comm.wire import Wire, as_born
from funczero.core.number import flag, number
from funczero.step.zero import zero, zeropp

Wires = Wire | tuple[Wire, Wire]


class Zero(NamedTuple):
    """How the training step of `funczero.hf.Trainer` is sharded, sent and added.

    Law: whatever stands here but wires, a policy and an optimizer, the parameters are the same bits.

    Args:
      stage: 0 nothing is sharded; 1 optimizer state; 2 and gradients; 3 and parameters.
      hpz: ranks of a node, in which parameters rest sharded, while gradients and optimizer state are sharded over all
        ranks (ZeRO++'s secondary partition); 1: there are no nodes. Written with stage=3.
      weights: how views travel, a wire as fz.int8(2048), with hpz across nodes or (within one, across).
      gradients: how gradients travel, likewise.
      sums: "tree", the same bits on 1, 2, 4, ... ranks; "exact", on any number; "backend".
      threshold: leaves with fewer values stay whole.
      ema: the decay of a running average of the parameters, which `trainer.whole(averaged=True)` shows.
      optimizer: a function of the learning rate that makes it, instead of TrainingArguments' `optim`, as
        lambda lr: fz.partition([(fz.matrices(but="wte"), fz.muon(lr)), ("", fz.adamw(lr))]).
      policy: dtypes, instead of what bf16, fp16 and the model say.
      units, conditional: as fz.stateless's.
      chain: any other chain: (gradient, *transforms, accumulate=parts) -> parts, as fz.mics is. The transforms are a
        loss scale, a clip, the optimizer and the average.
      mesh: axis sizes by name of that chain; None: all ranks on "data".
      give_back: after training the module has whole weights on every rank. False: it has none, and evaluate, predict
        and save_model read the sharded ones.
    """

    stage: int = 2
    hpz: int = 1
    weights: Wires | None = None
    gradients: Wires | None = None
    sums: str = "tree"
    threshold: int = 0
    ema: float | None = None
    optimizer: Callable[[Any], Any] | None = None
    policy: str | None = None
    units: Sequence[str] | None = None
    conditional: Sequence[str] | None = None
    chain: Callable[..., Any] | None = None
    mesh: Mapping[str, int] | None = None
    give_back: bool = True

    def checked(self, world: int) -> Zero:
        """Refuse what does not exist, or says two things.

        Raises:
          ValueError, TypeError: by name.
        """
        flag("Zero", "give_back", self.give_back)
        if self.ema is not None:
            number("Zero", "ema", self.ema, high=1.0)
        if isinstance(self.stage, bool) or self.stage not in (0, 1, 2, 3):
            raise ValueError(f"Zero: stage={self.stage!r} does not exist; write 0, 1, 2 or 3")
        if isinstance(self.hpz, bool) or not isinstance(self.hpz, int) or self.hpz < 1 or world % self.hpz:
            why = f"does not cut {world} ranks into nodes"
            raise ValueError(f"Zero: hpz={self.hpz!r} {why}; write how many ranks a node has")
        if self.hpz > 1 and self.stage != 3:
            raise ValueError(f"Zero: hpz={self.hpz} shards parameters, and stage={self.stage} does not; write stage=3")
        if self.optimizer is not None and (not callable(self.optimizer) or hasattr(self.optimizer, "init")):
            why = "the Trainer has a schedule, whose rate an optimizer that is made already does not follow"
            raise TypeError(f"Zero: optimizer= is no function, but {why}; write optimizer=lambda lr: fz.adamw(lr)")
        named = [n for n in ("hpz", "weights", "gradients", "threshold") if getattr(self, n) != Zero._field_defaults[n]]
        if self.chain is not None and named:
            raise ValueError(f"Zero: {named[0]}= is written beside chain=, which would not hear of it; leave out one")
        if self.mesh is not None and self.chain is None:
            raise ValueError("Zero: mesh= is of a chain= that reads its axes; write hpz= for nodes, or leave it out")
        return self

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that rows are dealt over, outermost first."""
        return tuple(self.mesh or {}) or (("node", "local") if self.hpz > 1 else ("data",))

    def sizes(self, world: int) -> dict[str, int]:
        """The mesh."""
        return dict(self.mesh or ({"node": world // self.hpz, "local": self.hpz} if self.hpz > 1 else {"data": -1}))

    def parts(self, grad: Any, transforms: Sequence[Any], accumulate: tuple[Any, ...]) -> tuple[Any, ...]:
        """The chain."""
        if self.chain is not None:
            return tuple(self.chain(grad, *transforms, accumulate=accumulate))
        if self.hpz == 1:
            return zero(
                grad,
                *transforms,
                stage=self.stage,
                accumulate=accumulate,
                threshold=self.threshold,
                gather=_one("weights", self.weights),
                scatter=_one("gradients", self.gradients),
            )
        return zeropp(
            grad,
            *transforms,
            weights=self.weights or as_born,
            gradients=self.gradients or as_born,
            accumulate=accumulate,
            threshold=self.threshold,
        )


def _one(what: str, wire: Wires | None) -> Wire:
    if wire is None:
        return as_born
    if not isinstance(wire, Wire):
        raise ValueError(f"Zero: {what}= names two wires, but there is one axis to cross; write one, or hpz=")
    return wire

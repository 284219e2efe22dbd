"""A tree of parameters that a loss reads and this step does not move: a teacher, a reference, another network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.utils._pytree as pytree

from funczero.comm.edge import Edge
from funczero.comm.wire import Key
from funczero.core import tree
from funczero.core.types import Env, TrainState
from funczero.gradients.loss import written
from funczero.gradients.tape import Lent, Tape
from funczero.layout.lazy import lazy
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.step.fits import at
from funczero.step.step import Step


class Frozen:
    """Parameters at rest as one value that may stand in a batch or a closure; `params()` opens them inside a loss."""

    def __init__(self, views: Slots, env: Env, key: Key, state: TrainState | None = None) -> None:
        """views: this rank's part, in the compute dtype; env: where they are gathered; key: of the wires that do."""
        self.views, self.env, self.key, self.state = Slots(views.buffers, _still(views.where)), env, key, state
        self.lent: list[Lent] = []  # leaves that losses were given

    def params(self) -> Any:
        """The tree, for a forward: whole outside the units, and inside them closed until fz.layers, fz.gather or
        the module's block opens one. No gradient reaches it; one passes through it to the forward's inputs.

        A collective where it is cut, so that all ranks call it alike.

        Raises:
          RuntimeError: it was the state of a step that has used it up (fz.donate), or a loss wrote into what it had.
        """
        if self.state is not None and int(self.state.step) < 0:
            why = "its state was donated and its memory is in use"
            raise RuntimeError(f"frozen: {why}; write fz.frozen(state, step) with the state that the step returned")
        leaves = self.views.where.structure.leaves
        for lent in self.lent:
            if lent.writes._version:
                raise written(leaves[lent.leaf].path)
        # nothing is started ahead, for nobody would wait for it where a loss stops early
        tape = Tape(self.views, (), self.env._replace(prefetch=False), False, True, self.key)
        rest = tape.open_rest()
        tape.lent += [lent for lent in self.lent if lent.itself() is not None]
        tape.lend(tape.tensors(rest))
        self.lent = tape.lent
        return self.views.where.structure.unflatten(rest)

    @property
    def model_state(self) -> Any:
        """The model's own state beside it, for a forward to copy; None where there is none."""
        return None if self.state is None else self.state.model_state

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        cut = f", cut over {list(self.views.where.axes)}" if self.views.where.axes else ""
        return f"<Frozen {len(self.views.where.structure.leaves)} leaves{cut}>"


pytree.register_constant(Frozen)  # no leaf of a batch, so that it is handed on whole to every micro-batch


def frozen(what: Any, step: Step, stage: int = 3, units: Sequence[str] | None = None) -> Frozen:
    """Parameters that a loss reads and nobody moves meanwhile, at rest with a stage of their own.

    A whole tree, as a teacher or a reference, is cut into rows once and has no gradient and no moments; a state is read
    where it lies, without a copy, as another network is by the loss of this one:
    `step_d(d, {"x": rows, "generator": fz.frozen(g, step_g)})`. In the loss `reference.params()` is the tree. Units are
    opened one by one in the forward, and again in a backward that passes through them.

    Layout: rows over the axes of the step's batch, or as the state's views rest. Memory: this rank's part in
    `policy.compute`.

    Args:
      what: whole parameters, or a TrainState of `step`.
      step: on whose mesh they lie; a loss may read what was made with the very step that it belongs to.
      stage: of a tree: 3 is cut, 0 to 2 are whole on every rank.
      units: of a tree: paths of lists of like subtrees, as `loss_fn.units` of fz.stateless; by default those of the
        step's gradient that are among its paths.

    Raises:
      ValueError: there is no such stage.

    >>> import torch, funczero as fz
    >>> def loss_fn(params, batch):
    ...     return ((params["w"] - teacher.params()["w"]) ** 2 * batch).sum(), batch.sum()
    >>> step = fz.train_step(fz.value_and_grad(loss_fn), fz.sgd(0.25))
    >>> teacher = fz.frozen({"w": torch.tensor(2.0)}, step)
    >>> state, metrics = step(step.init({"w": torch.tensor(0.0)}), torch.ones(3))
    >>> metrics.loss.item(), step.params(state)["w"].item()
    (4.0, 1.0)
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"frozen: stage={stage!r} does not exist; write 3, or 0 for whole parameters on every rank")
    env = step.running().env
    if isinstance(what, TrainState):
        step.fits.look(what)
        return Frozen(step.views(what), env, at(what), what)
    env = env._replace(edges={a: Edge(a, sums=e.sums, adds=e.adds) for a, e in env.edges.items()})
    if units is None:
        names = [path for path, _ in tree.paths(what)]
        units = [u for u in step.source.units if any(n.startswith((f"{u}/", f"{u}.")) for n in names)]
    own = lazy(what, units, {}, lambda path: True, env.mesh.device)
    axes = step.source.batch if stage == 3 else ()
    return Frozen(own.at(env.mesh.coords(axes), env.policy.compute), env, (0,))


def _still(where: Where) -> Where:
    """The same place of leaves that are all frozen."""
    found: Where | None = where.memo.get("still")
    if found is None:
        structure = where.structure
        still = structure.memo.get("still")
        if still is None:
            units = tuple(u._replace(frozen=True) for u in structure.units)
            still = structure.memo["still"] = replace(structure, units=units)
        found = where.memo["still"] = replace(where, structure=still)
    return found

"""A tree of parameters that a loss reads and this step does not move: a teacher, a reference, another network, the
base of adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch.utils._pytree as pytree

from funczero.comm.edge import Edge
from funczero.comm.wire import Key
from funczero.core import tree
from funczero.core.number import dtype_name
from funczero.core.planned import planned
from funczero.core.types import Env, TrainState
from funczero.gradients.loss import written
from funczero.gradients.stored import STORAGES, Stored, StoredTape, empty, stored
from funczero.gradients.tape import Lent, Tape
from funczero.layout.lazy import Lazy, lazy
from funczero.layout.mesh import Coords, Mesh
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure
from funczero.layout.where import Where
from funczero.step.fits import at
from funczero.step.step import Step


class Frozen:
    """Parameters at rest as one value that may stand in a batch or a closure; `params()` opens them inside a loss."""

    def __init__(self, views: Slots | Stored, env: Env, key: Key = (0,), state: TrainState | None = None) -> None:
        """views: this rank's part; env: where they are gathered; key: of the wires that do."""
        self.stored = views if isinstance(views, Stored) else None
        self.views = views.rest if isinstance(views, Stored) else Slots(views.buffers, _still(views.where))
        self.where = views.plain if isinstance(views, Stored) else self.views.where
        self.env, self.key, self.state = env, key, state
        self.lent: list[Lent] = []  # leaves that losses were given

    def params(self) -> Any:
        """The tree, for a forward: whole outside the units, and inside them closed until fz.layers, fz.gather or
        the module's block opens one. No gradient reaches it; one passes through it to the forward's inputs.

        A collective where it is cut, so that all ranks call it alike.

        Raises:
          RuntimeError: it was the state of a step that has used it up (fz.donate), or a loss wrote into what it had.
        """
        plan = planned()
        if plan is not None and plan.mesh is not None and plan.mesh is not self.env.mesh:
            return plan.there(self, lambda: self.on(plan.mesh)).params()
        if self.state is not None and int(self.state.step) < 0:
            why = "its state was donated and its memory is in use"
            raise RuntimeError(f"frozen: {why}; write fz.frozen(state, step) with the state that the step returned")
        leaves = self.where.structure.leaves
        for lent in self.lent:
            if lent.writes._version:
                raise written(leaves[lent.leaf].path)
        # nothing is started ahead, for nobody would wait for it where a loss stops early
        env = self.env._replace(prefetch=False)
        plain = lambda: Tape(self.views, (), env, False, True, self.key)
        tape = plain() if self.stored is None else StoredTape(self.stored, env, self.key)
        rest = tape.open_rest()
        tape.lent += [lent for lent in self.lent if lent.itself() is not None]
        tape.lend(tape.tensors(rest))
        self.lent = tape.lent
        return self.where.structure.unflatten(rest)

    def on(self, mesh: Mesh) -> Frozen:
        """The same leaves on another mesh, whose axes have the same names; without values, for a plan.

        Raises:
          ValueError: that mesh lacks an axis that they are cut over.
        """
        odd = next((a for a in self.where.axes if a not in mesh.axes), None)
        if odd is not None:
            why = f"the loss reads parameters that fz.frozen cut over {odd!r}, which the mesh ({mesh}) has not"
            raise ValueError(f"plan: {why}; plan on a mesh with that axis, or write fz.frozen(..., axes=...)")
        coords, env = mesh.coords(self.where.axes), self.env._replace(mesh=mesh)
        structure = replace(self.where.structure)  # what forwards of a run have learned of it is not known here
        if self.stored is not None:
            return Frozen(empty(structure, coords, self.stored.dtype, self.stored.coded, mesh.device), env, self.key)
        where = replace(self.where, structure=structure, coords=coords)
        return Frozen(Slots.zeros(where, self.views.buffers[0].dtype, mesh.device), env, self.key)

    @property
    def nbytes(self) -> int:
        """Bytes that rest on this rank."""
        return self.stored.nbytes if self.stored is not None else sum(b.nbytes for b in self.views.buffers)

    @property
    def model_state(self) -> Any:
        """The model's own state beside it, for a forward to copy; None where there is none."""
        return None if self.state is None else self.state.model_state

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        cut = f", cut over {list(self.where.axes)}" if self.where.axes else ""
        return f"<Frozen {len(self.where.structure.leaves)} leaves{cut}, {self.nbytes} bytes>"


pytree.register_constant(Frozen)  # no leaf of a batch, so that it is handed on whole to every micro-batch


def frozen(
    what: Any,
    step: Step,
    stage: int = 3,
    units: Sequence[str] | None = None,
    axes: Sequence[str] | None = None,
    storage: str | None = None,
    keep: str | None = None,
) -> Frozen:
    """Parameters that a loss reads and nobody moves meanwhile, at rest with a stage of their own.

    A whole tree, as a teacher or a reference, is cut into rows once and has no gradient and no moments; a state is read
    where it lies, without a copy, as another network is by the loss of this one:
    `step_d(d, {"x": rows, "generator": fz.frozen(g, step_g)})`. In the loss `reference.params()` is the tree. Units are
    opened one by one in the forward, and again in a backward that passes through them.

    Layout: rows over the axes of the step's batch, or as the state's views rest. Memory: this rank's part in
    `policy.compute`, or as `storage` says.

    Args:
      what: whole parameters, or a TrainState of `step`.
      step: on whose mesh they lie; a loss may read what was made with the very step that it belongs to.
      stage: of a tree: 3 is cut, 0 to 2 are whole on every rank.
      units: of a tree: paths of lists of like subtrees, as `loss_fn.units` of fz.stateless; by default those of the
        step's gradient that are among its paths.
      axes: of a tree: the mesh axes that its rows are cut over, outermost first, as ("local",) for a copy a node.
      storage: of a tree: "int8" rests matrices in codes of 8 bits and a scale for every 256 values of a row, whose
        error is at most 1 / 254 of the largest of these before it is rounded to `policy.compute`; "bfloat16" rounds
        everything. A unit is widened as it is opened, and what a loss reads is the same on any mesh. None: in
        `policy.compute`.
      keep: a regex of paths that have no codes of int8, and stay in `policy.compute`.

    Raises:
      ValueError: there is no such stage, storage or axis; keep finds nothing; a leaf to be coded is not finite.

    >>> import torch, funczero as fz
    >>> def loss_fn(params, batch):
    ...     return ((params["w"] - teacher.params()["w"]) ** 2 * batch).sum(), batch.sum()
    >>> step = fz.train_step(fz.value_and_grad(loss_fn), fz.sgd(0.25))
    >>> teacher = fz.frozen({"w": torch.tensor(2.0)}, step)
    >>> state, metrics = step(step.init({"w": torch.tensor(0.0)}), torch.ones(3))
    >>> metrics.loss.item(), step.params(state)["w"].item()
    (4.0, 1.0)
    """
    _check_stage(stage)
    env = step.running().env
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"frozen: storage={storage!r} does not exist; write one of {', '.join(STORAGES)}")
    if isinstance(what, TrainState):
        told = next((n for n, x in (("axes", axes), ("storage", storage), ("keep", keep)) if x is not None), None)
        if told is not None:
            why = "is of a tree, and a state is read where it lies"
            raise ValueError(f"frozen: {told} {why}; give step.params(state), or leave it out")
        step.fits.look(what)
        return Frozen(step.views(what), env, at(what), what)
    own, coords, env = placed(what, step, stage, units, axes)
    dtype = env.policy.compute
    if keep is not None:
        why = tree.unmatched(keep, [leaf.path for leaf in own.structure.leaves])
        if storage != "int8" or why:
            raise ValueError(f"frozen: keep={keep!r}: {why or 'storage=int8 alone has codes'}; leave it out")
    if storage is None or storage == dtype_name(dtype):
        return Frozen(own.at(coords, dtype), env)
    kept = lambda path: keep is not None and re.search(keep, path) is not None
    return Frozen(stored(own, still(own.structure), coords, dtype, storage, kept), env)


def _check_stage(stage: int) -> None:
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"frozen: stage={stage!r} does not exist; write 3, or 0 for whole parameters on every rank")


def placed(
    what: Any, step: Step, stage: int, units: Sequence[str] | None, axes: Sequence[str] | None
) -> tuple[Lazy, Coords, Env]:
    """A tree part by part, which part is this rank's, and how it is crossed; arguments as frozen's.

    Raises:
      ValueError: there is no such stage or axis.
    """
    _check_stage(stage)
    env = step.running().env
    env = env._replace(edges={a: Edge(a, sums=e.sums, adds=e.adds) for a, e in env.edges.items()})
    if units is None:
        names = [path for path, _ in tree.paths(what)]
        units = [u for u in step.source.units if any(n.startswith((f"{u}/", f"{u}.")) for n in names)]
    over = tuple(step.source.batch if axes is None else axes) if stage == 3 else ()
    odd = next((a for a in over if a not in env.mesh.axes), None)
    if odd is not None:
        raise ValueError(f"frozen: {odd!r} is no axis of the mesh; it has {list(env.mesh.axes)}")
    return lazy(what, units, {}, lambda path: True, env.mesh.device), env.mesh.coords(over), env


# --- a base beside what learns ----------------------------------------------------------------------------------------
class Beside(NamedTuple):
    """A loss of what learns alone, and its two halves of parameters by name; see `fz.beside`."""

    loss_fn: Callable[..., Any]
    params: dict[str, Any]  # that learn, for step.init
    rest: dict[str, Any]  # that do not, for fz.frozen


def beside(loss_fn: Callable[..., Any], params: Mapping[str, Any], base: Callable[[], Frozen]) -> Beside:
    """A module's loss as a function of its learning parameters alone; those that it keeps still lie in `base`.

    So a base has a stage, a placement and a storage of its own, the state holds adapters and nothing else, and so do
    its checkpoints. At the seam a block opens its parts of both. Such a loss knows no remat and no higher_order, and
    fz.generate wants a model whose parameters are all the state's.

        model = adapters.module(model)
        loss_fn, params, rest = fz.beside(*fz.stateless(model, loss), lambda: base)
        step = fz.train_step(*fz.zero(fz.value_and_grad(loss_fn, batch=P("data")), fz.adamw(1e-4), stage=2))
        base = fz.frozen(rest, step, storage="int8")
        state = step.init(params)

    Args:
      loss_fn, params: what fz.stateless returned for a module with adapters, or with other frozen parameters.
      base: returns the Frozen, which is made once the step is there.

    Raises:
      ValueError: nothing learns, or nothing is frozen; or ranks need not run the same blocks, which a Frozen does not
        agree on.
    """
    learns = getattr(loss_fn, "trainable", None)
    mine = {n: x for n, x in params.items() if learns is None or learns(n)}
    rest = {n: x for n, x in params.items() if n not in mine}
    if not mine or not rest:
        what = "learns" if not mine else "is frozen"
        raise ValueError(f"beside: nothing {what} among the parameters; give what fz.stateless returned for fz.lora's")
    some = getattr(loss_fn, "conditional", ())
    if some:
        why = f"ranks need not run the same blocks of {list(some)}, and nobody agrees on those of a base"
        raise ValueError(f"beside: {why}; leave those lists out of fz.stateless(..., units=...)")

    def bound(fn: Callable[..., Any]) -> Any:
        return lambda params, *args, **kwargs: fn({**base().params(), **params}, *args, **kwargs)

    whole: Any = loss_fn
    fn = bound(whole)
    fn.units = tuple(u for u in whole.units if any(n.startswith(f"{u}.") for n in mine))
    fn.ties = {a: b for a, b in whole.ties.items() if a in mine}
    fn.conditional, fn.trainable, fn.keyed, fn.synced = (), None, True, whole.synced
    for name in ("state", "rules"):
        if hasattr(whole, name):
            setattr(fn, name, getattr(whole, name))
    fn.reading = lambda values: bound(whole.reading(values))
    return Beside(fn, mine, rest)


def still(structure: Structure) -> Structure:
    """The same leaves, all frozen."""
    found: Structure | None = structure.memo.get("still")
    if found is None:
        units = tuple(u._replace(frozen=True) for u in structure.units)
        found = structure.memo["still"] = replace(structure, units=units)
    return found


def _still(where: Where) -> Where:
    """The same place of leaves that are all frozen."""
    found: Where | None = where.memo.get("still")
    if found is None:
        found = where.memo["still"] = replace(where, structure=still(where.structure))
    return found

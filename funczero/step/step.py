"""The train step: a chain that ends in an update, as a pure function of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from funczero.comm.integers import sum_and_compare
from funczero.core import order, tree
from funczero.core.held import transformed, transforming
from funczero.core.order import Dealt
from funczero.core.policy import Policy
from funczero.core.rows import counting, moved, opened
from funczero.core.types import Grad, Metrics, TrainState, Updated
from funczero.gradients.call import reading
from funczero.gradients.draws import keyed
from funczero.gradients.loss import check_loss, drew
from funczero.gradients.synced import Across
from funczero.gradients.tape import Tape
from funczero.layout.mesh import Mesh, located
from funczero.layout.slots import Slots
from funczero.layout.spec import P
from funczero.step.calls import recorded
from funczero.step.describe import describe
from funczero.step.fits import Fits, at
from funczero.step.initial import initial, read_lazily
from funczero.step.look import by_path, gathered, written
from funczero.transforms.chain import Source

Own = TypeVar("Own")  # what a transform keeps


class Eval(NamedTuple):
    """A loss over all rows given, on all ranks."""

    loss: Tensor  # mean over the weight
    weight: Tensor


class Step(NamedTuple):
    """`state, metrics = step(state, batch)`: same inputs, same bits, and the inputs are left as they were (see
    donate).
    """

    init: Callable[..., TrainState]
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics | None]]
    grad: Grad  # as planned: it prints and checks without any process
    running: Callable[[], Grad]  # the same on the live mesh
    source: Source
    rebuild: Callable[..., Step]  # (donating, capture) -> the same step, otherwise run
    # (environment, and another Source where it is given) -> the same chain, built there
    interpreted: Callable[..., Grad]
    fits: Fits  # which states it takes, and what their views are
    look: Callable[[TrainState, Any], Slots]  # the gradient that an update would apply

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics | None]:
        """One update, or with a streamed chain one micro-batch (metrics None) and, with batch None, the update.

        Raises:
          RuntimeError: it is called inside torch.compile, or on what torch.func is transforming.
        """
        if torch.compiler.is_compiling():
            not_compiled()
        if transforming():
            _not_transformed(state, batch)
        return self.update(state, batch)

    @property
    def mesh(self) -> Mesh:
        """The mesh with its count of bytes sent, and this rank's place on it; joins no world.

        Before the world is joined the place is what the launcher's environment says; of a plan for another world there
        is none, and to ask for an index raises.
        """
        return located(self.grad.env.mesh)

    @property
    def live_mesh(self) -> Mesh:
        """The mesh with its process groups, to send over; joins the world."""
        return self.running().env.mesh

    @property
    def policy(self) -> Policy:
        """The dtypes."""
        return self.grad.env.policy

    def local_rows(self, batch: Any, rows: int | None = None) -> Any:
        """This rank's rows of a global batch, dealt in the chain's order of sums, on the mesh's device; what has no
        rows (P() in batch=, None, numbers, text, tensors without dims) comes whole.

        Args:
          rows: of one micro-batch. There may then be fewer micro-batches than the chain has places for, as 8 on three
            ranks with accumulate(3): a rank whose place is empty runs a copy that counts for nothing, and what is
            returned says so (Dealt); give it to the step as it is. None: a micro-batch for every place.

        Raises:
          ValueError: the rows do not divide by the number of micro-batches; the batch is none of what batch= says.
          TypeError: a leaf that is no tensor, or has no such dim.
        """
        mesh = self.live_mesh
        mine = order.deal(batch, self.grad.layout, mesh.index, rows)
        if mesh.device.type == "cpu":
            return mine
        if isinstance(mine, Dealt):
            return mine._replace(rows=moved(mine.rows, mesh.device))
        return moved(mine, mesh.device)

    def view(self, state: TrainState) -> Any:
        """The whole parameters in the compute dtype as fresh leaves that want a gradient, for a forward of your own
        (pullback).
        """
        self.fits.look(state)
        slots = self.whole_views(state)
        units = slots.where.structure.units
        leaves = [
            x if x is None else x.detach().requires_grad_(not units[i.unit].frozen)
            for x, i in zip(slots.leaves(), slots.where.structure.leaves, strict=True)
        ]
        return slots.where.structure.unflatten(leaves)

    def views(self, state: TrainState) -> Slots:
        """This rank's part of the parameters at rest in the compute dtype. A collective where the masters were
        replaced.
        """
        return self.fits.views(state)

    def whole_views(self, state: TrainState) -> Slots:
        """The whole parameters in the compute dtype. A collective where they are sharded at rest."""
        return self.running().view(self.views(state), at(state))

    def tape(self, state: TrainState, differentiate: bool = False) -> Tape:
        """What a forward of your own opens parameters with (see layers.py); with differentiate its leaves want a
        gradient.
        """
        env, conditional = self.running().env, bool(self.source.conditional)
        return Tape(self.views(state), (), env, False, differentiate, at(state), conditional=conditional)

    def state_of(self, state: TrainState, kind: type[Own]) -> Own | None:
        """The state of the first transform of a kind, as step.state_of(state, ScaleLoss); None where the chain has
        none.

        Args:
          kind: the NamedTuple that the transform keeps.
        """
        return next((own for own in state.chain.values() if isinstance(own, kind)), None)

    def with_state(self, state: TrainState, own: Any) -> TrainState:
        """The state with another one of the first transform of own's kind.

        Raises:
          KeyError: the chain has no such transform.
        """
        name = next((name for name, x in state.chain.items() if type(x) is type(own)), None)
        if name is None:
            raise KeyError(
                f"with_state: no transform of this chain keeps a {type(own).__name__}; it has {list(state.chain)}"
            )
        return state._replace(chain={**state.chain, name: own})

    def params(self, state: TrainState, trained: bool = False) -> Any:
        """The whole masters as the tree given to init; a collective, and a copy.

        Args:
          trained: only those that learn, as {path: whole leaf}: adapters without what they stand beside, of which
            nothing is gathered.
        """
        self.fits.look(state)
        if trained:
            learning = lambda state: by_path(gathered(state.params.trainable(), self.live_mesh))
            return recorded("step.params(trained=True)", learning, self.running)(state)
        return recorded("step.params", self._whole, self.running)(state)

    def grads(self, state: TrainState, batch: Any, whole: bool = True) -> dict[str, Tensor]:
        """The gradient by path that step(state, batch) would hand to its last optimizer: a mean, unscaled and clipped.

        A collective; nothing is applied. What is frozen is not there.

        Args:
          whole: False gives this rank's part of what is sharded there.
        """
        found = self.look(state, batch)
        return by_path(gathered(found, self.live_mesh) if whole else found)

    def set(self, state: TrainState, values: Mapping[str, Any]) -> TrainState:
        """The state with other parameters at some paths: whole tensors, or one number for all of a leaf's values.

        A collective, in which ranks compare what they were given. Moments stay; views follow.

        Raises:
          KeyError, TypeError, ValueError: no such path; another shape or a wider dtype; ranks differ.
        """
        self.fits.look(state)
        return recorded("step.set", lambda state: written(state, values, self.live_mesh), self.running)(state)

    def _whole(self, state: TrainState) -> Any:
        whole = gathered(state.params, self.live_mesh)
        return whole.where.structure.unflatten([x if x is None else x.clone() for x in whole.leaves()])

    def specs(self, params: Any) -> dict[str, Any]:
        """The explicit PartitionSpec of every leaf: of `params`, `views`, `grads` and every transform's state, by name.

        Args:
          params: whole parameters, meta tensors do; nothing is allocated.
        """
        meta = read_lazily(self.source, self.grad, params, torch.device("meta"))
        state = self.grad.init(meta)
        masters: Slots = state["params"]
        rest = self.grad.env.mesh.coords(self.grad.layout.rest)
        out = {name: tree.map(_spec_tree, own, is_leaf=lambda x: isinstance(x, Slots)) for name, own in state.items()}
        return out | {"grads": _spec_tree(masters), "views": _spec_tree(meta.at(rest, self.grad.env.policy.compute))}

    def abstract(self, params: Any) -> TrainState:
        """The state that init would give as shapes: on the meta device, without memory. A checkpoint is restored into
        this form.

        Args:
          params: whole parameters, meta tensors do.
        """
        g = self.running()
        return initial(g, read_lazily(self.source, g, params, torch.device("meta")), 0)

    def eval(self, loss_fn: Callable[..., Any], has_state: bool | None = None) -> Callable[[TrainState, Any], Eval]:
        """A forward of `loss_fn(params, batch) -> (sum, weight)` with the current views: (state, this rank's rows)
        -> Eval.

        Args:
          has_state: the loss is called as loss_fn(params, model_state, batch), and returns a state, which is dropped.
            By default so is one of fz.stateless that changes buffers; one of an evaluating module reads the state's.
        """

        loss_fn = counting(loss_fn, self.grad.layout.cut)

        def evaluate(state: TrainState, batch: Any) -> Eval:
            g = self.running()
            self.fits.look(state)
            tape, fn = self.tape(state), reading(
                loss_fn, has_state, g.env.model, state.model_state, Across(g.env.mesh, g.layout.batch)
            )
            with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version counters
                rest = tape.open_rest()
                counts = not isinstance(batch, Dealt) or batch.here > 0
                if isinstance(batch, Dealt):
                    batch = batch.real()
                with nullcontext() if getattr(fn, "keyed", False) else keyed(None, g.env.mesh.device, drew):
                    loss, weight, *_ = check_loss(fn(tape.whole.structure.unflatten(rest), batch), has_aux=False)
                tape.left_alone(tape.tensors(rest), None)
                tape.end()
            sums = torch.stack([loss.double(), weight.double().to(loss.device)])
            return _mean_over_ranks(sums if counts else torch.zeros_like(sums), g)

        return recorded("step.eval", evaluate, self.running)

    def __str__(self) -> str:
        return describe(self.grad, self.source, self.fits.book.masters)

    def __repr__(self) -> str:
        return f"<Step {' | '.join(self.grad.names)}>"


def not_compiled() -> None:
    """Refuse torch.compile of a step: the call that it would trace raises here, as it runs.

    Raises:
      RuntimeError: always.
    """
    why = "it sends, and writes into buffers of its own, which its compiler cannot trace"
    remedy = "compile the loss function or a block inside it, or trace fz.differentiable(step) with make_fx"
    raise RuntimeError(f"step: torch.compile does not go through a step, because {why}; {remedy}")


# as torch.compiler.disable says it, which would import the compiler
not_compiled._torchdynamo_disable = True  # type: ignore[attr-defined]


def _not_transformed(state: TrainState, batch: Any) -> None:
    """Refuse what has a tangent, a gradient of torch.func or more than one value; and any call inside torch.func."""
    inside = [(path, x) for path, x, _ in opened(batch)[0]]
    for what, found in (("state", tree.paths(state)), ("batch", inside)):
        for path, x in found:
            if isinstance(x, Tensor) and transformed(x):
                why = "is batched or differentiated by torch.func, and the step's values would be without it"
                raise RuntimeError(f"step: {path!r} of its {what} {why}; write fz.differentiable(step) in its place")
    if transforming(forward=False):
        why = "it is called inside a transform of torch.func, where torch differentiates nothing by itself"
        raise RuntimeError(f"step: {why}; call it outside, or write fz.differentiable(step) in its place")


def metrics_of(out: Updated, state: TrainState) -> Metrics:
    """What a step reports of an update and the state after it."""
    device = out.loss.device
    norm = out.logs.get("grad_norm", out.norm)
    scale = out.logs.get("scale", torch.ones((), dtype=torch.float64, device=device))
    lr = out.logs.get("lr", torch.full((), float("nan"), dtype=torch.float64, device=device))
    return Metrics(out.loss, out.weight, norm, out.ok, out.weight == 0, scale, lr, state.updates, out.aux)


def _mean_over_ranks(sums: Tensor, g: Grad) -> Eval:
    axes = g.layout.batch
    index, size = g.env.mesh.rank(axes)
    bits = torch.zeros(size, 2, dtype=torch.int64, device=sums.device)
    bits[index] = sums.view(torch.int64)
    total, _ = sum_and_compare([bits.view(-1)], axes, g.env.mesh)
    loss, weight = order.tree_sum(total.view(torch.float64).view(size, 2))
    return Eval(loss / weight, weight)


def _spec_tree(x: Any) -> Any:
    if not isinstance(x, Slots):
        return P()
    return x.where.structure.unflatten([x.where.spec(i) for i in range(len(x.where.structure.leaves))])

"""The types everything stands on: what flows through a chain, and what a chain is checked against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

from torch import Tensor

Tree = Any  # a pytree: nested dicts, lists, tuples and NamedTuples of tensors


class ChainError(TypeError):
    """A chain that cannot mean what it says; raised where it is built, in any process."""


class Sum(NamedTuple):
    """A sum over examples: what flows left of the mean."""

    loss: Tensor  # [micro-batches], in the order of time
    weight: Tensor  # [micro-batches]
    aux: Any  # the user's sums as ([micro-batches, n] float64, their tree); None without has_aux
    grads: Any  # Slots (slots.py) at this place of the chain
    bad: Any = None  # [leaves] int64, only while looking for it: values that are not finite


class Value(NamedTuple):
    """A value: what flows right of the mean, and what nonlinear transforms read."""

    loss: Tensor  # 0-d, as all that follow but aux and grads: the mean over the update's weight
    weight: Tensor
    aux: Any  # the user's sums over all micro-batches and ranks, as their tree
    grads: Any  # Slots at this place of the chain
    factor: Tensor  # still to be multiplied into grads: mean, unscale and clip touch only this
    norm: Any  # of factor * grads; None once a transform has rewritten grads
    ok: Tensor  # bool: may this update be applied?
    bad: Any = None  # [2] int64, only while looking for it: (leaf, rank) of the first value that is not finite
    logs: dict[str, Tensor] = {}  # scalars for the metrics: scale, lr


class Updated(NamedTuple):
    """New parameters: what flows right of the last optimizer."""

    loss: Tensor
    weight: Tensor
    aux: Any
    params: Any  # Slots at this place of the chain: the masters, and their views once a bracket has closed
    norm: Any
    ok: Tensor
    bad: Any = None
    logs: dict[str, Tensor] = {}


Out = Sum | Value | Updated  # what a gradient returns, by the phase of its layout
Phase = Literal["sum", "value", "updated"]


class Seed(NamedTuple):
    """What flows from the step to the gradient, right to left through the chain."""

    cotangent: Tensor  # seed of the backward pass
    key: int  # randomness of this update
    index: int = 0  # global index of the micro-batch, filled in digit by digit
    look: bool = False  # count non-finite values per leaf, to name the first
    at: tuple[int, int] = (0, 0)  # the run's key and the number of this update: what wires of views draw from


@dataclass(frozen=True)
class Layout:
    """The type of a gradient: what it is summed over, what it is split over, in which order.

    >>> Layout(batch=("data",), unreduced=frozenset({"data"})).describe()
    "sum, unreduced over ['data']"
    """

    batch: tuple[str, ...] = ()  # mesh axes the batch is split over
    unreduced: frozenset[str] = frozenset()  # of these, the axes over which grads are still partial sums
    sharded: tuple[str, ...] = ()  # mesh axes the grads are split over, outermost first
    rest: tuple[str, ...] = ()  # mesh axes the views at rest are split over
    order: tuple[tuple[str, int], ...] = ()  # the sums taken so far, first one first
    phase: Phase = "sum"  # what flows: a Sum, a Value, or Updated parameters

    @property
    def mean(self) -> bool:
        """Is the mean taken?"""
        return self.phase != "sum"

    @property
    def applied(self) -> bool:
        """Are these new parameters?"""
        return self.phase == "updated"

    @property
    def stride(self) -> int:
        """Micro-batches summed so far: the place value of the next digit of the global index."""
        return prod(n for _, n in self.order)

    def describe(self) -> str:
        """This layout in the words of a printed chain."""
        words = ["new parameters" if self.applied else "mean" if self.mean else "sum"]
        if self.unreduced:
            words.append(f"unreduced over {[a for a in self.batch if a in self.unreduced]}")
        words += [f"sharded over {list(self.sharded)}"] * bool(self.sharded) + [f"of {self.stride} micro-batches"] * (
            self.stride > 1
        )
        return ", ".join(words)


class Env(NamedTuple):
    """Where and how a chain runs; the same for every transform of it."""

    mesh: Any  # Mesh (mesh.py)
    policy: Any  # Policy (policy.py)
    edges: dict[str, Any]  # mesh axis -> Edge (edge.py), brackets first and outermost first: how it is crossed
    donate: bool = False  # may the state be updated in place?
    prefetch: bool = True  # does the next block's gather start while one computes?
    early: Any = None  # what the first updates are looked at for (notices.py)

    @property
    def rules(self) -> dict[str, Any]:
        """Mesh axis -> how its bracket cuts leaves, outermost first; axes without a bracket are not named."""
        return {axis: edge.rules for axis, edge in self.edges.items() if edge.rules is not None}


class Grad(NamedTuple):
    """A stateful gradient: pure functions, the layout of what they return, and the chain so far."""

    init: Callable[[Any], dict[str, Any]]  # lazy parameters -> state, flat by transform name
    view: Callable[..., Any]  # (parameters at rest, key of the update) -> whole leaves that a forward may use
    apply: Callable[[Any, dict[str, Any], Any, Seed], tuple[Out | None, dict[str, Any]]]
    layout: Layout
    names: tuple[str, ...]
    env: Env
    arrows: tuple[Layout, ...] = ()  # the layout right of every name
    streams: bool = False  # does an accumulate to the left take one micro-batch a call?


Transform = Callable[[Grad], Grad]  # wraps everything to its left in the chain


class Group(NamedTuple):
    """Leaves that one set of rates moves in an update."""

    rates: Any  # name -> number, or a float32 tensor where a schedule was read on an accelerator
    leaves: tuple[int, ...] | None = None  # their numbers; None: all that the optimizer has


class Reading(NamedTuple):
    """The rates of one update, read from the state before anything is written."""

    groups: list[Group]
    rates: Any  # what the state keeps of them after the update; None where they are kept elsewhere
    lr: Tensor  # for the metrics


class Formula(NamedTuple):
    """An optimizer's formula, written once for any piece of a tree of parameters; `transforms/formula.py` runs it.

    It runs on clones in a pure step, in place in a donated one, on the leaves of one optimizer of a partition, and on
    copies in float64 for the plain pair. A state is a NamedTuple with a field `rates`, whose leaves are float64 and
    0-d.

    Args:
      read: (state, params, ok, donate) -> Reading; of Slots only the place counts, whose leaves may be a part of the
        tree.
      moments: state -> those of its fields that lie like the parameters.
      scalars: (state, rates by group, factor, ok) -> (the state with its own numbers after the update, scalars by
        group).
      leaf: (params, grads, moments, scalars), in place on lists of tensors, a group at a time; a rank that holds
        nothing gives empty lists.
      by_leaf: are the pieces leaves in their shapes, rather than padded flat buffers?
    """

    read: Callable[[Any, Any, Tensor, bool], Reading]
    moments: Callable[[Any], list[Any]]
    scalars: Callable[[Any, list[Any], Tensor, Tensor], tuple[Any, list[Any]]]
    leaf: Callable[[list[Tensor], list[Tensor], list[list[Tensor]], Any], None]
    by_leaf: bool = False


class GradientTransformation(NamedTuple):
    """optax's pair, unchanged; `formula` is the form that runs in place, on any piece.

    `init(params) -> state` and `update(updates, state, params) -> (updates, state)` are all that anybody's optimizer
    needs. `elementwise` promises that each value depends on its own place alone, so that it may be handed whole
    buffers; False: it needs whole leaves; None: it does not say.
    """

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]
    formula: Formula | None = None
    name: str = "lift"
    elementwise: bool | None = None


class _State(NamedTuple):
    params: Any  # the masters, as Slots: this rank's part, in policy.params
    views: Any  # wider copies at rest in policy.compute; None where a view is the cast master
    chain: dict[str, Any]  # state of each transform, by name
    step: Tensor  # calls that closed an update, skipped ones included; -1 - n once donated at n
    updates: Tensor  # applied updates
    key: Tensor  # seed of the run's randomness


class TrainState(_State):
    """A run as a value: everything that changes the trajectory is a leaf of it.

    Without views there is no leaf in their place, not a None that `tree_map` would hand to a function of tensors.
    """

    __slots__ = ()

    def __new__(
        cls, params: Any, views: Any, chain: dict[str, Any], step: Tensor, updates: Tensor, key: Tensor
    ) -> TrainState:
        """As the fields say."""
        return super().__new__(cls, params, () if views is None else views, chain, step, updates, key)

    @classmethod
    def _make(cls, values: Any) -> TrainState:
        return cls(*values)

    @property
    def views(self) -> Any:
        """Wider copies of the masters at rest; None where a view is the cast master."""
        return self[1] or None


class Metrics(NamedTuple):
    """What a step reports: 0-d tensors, read without a sync until you print them."""

    loss: Tensor  # mean over the update's weight, never scaled
    weight: Tensor
    grad_norm: Tensor  # of the mean gradient, before any clip
    ok: Tensor  # was the update applied?
    empty: Tensor  # did the update weigh nothing?
    scale: Tensor  # loss scale used; 1 without scale_loss
    lr: Tensor  # learning rate used; nan where the optimizer names none
    updates: Tensor  # applied so far
    aux: Any = None  # the user's sums

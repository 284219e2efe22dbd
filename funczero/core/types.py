"""The types everything stands on: what flows through a chain, and what a chain is checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from torch import Tensor

from funczero.core.link import Link

if TYPE_CHECKING:  # floors above this one, of which only the names are needed
    from funczero.comm.edge import Edge
    from funczero.comm.exact import Grid
    from funczero.core.policy import Policy
    from funczero.gradients.captured import Capture
    from funczero.layout.cut import Rules
    from funczero.layout.lazy import Lazy
    from funczero.layout.mesh import Mesh
    from funczero.layout.slots import Slots
    from funczero.layout.where import Where
    from funczero.step.notices import Early
    from funczero.transforms.model_state import Model
    from funczero.transforms.outputs import Aux

Tree = Any  # a pytree: nested dicts, lists, tuples and NamedTuples of tensors
State = dict[str, Tree]  # of a whole chain: each transform's own, by its name


class ChainError(TypeError):
    """A chain that cannot mean what it says; raised where it is built, in any process."""


class Sum(NamedTuple):
    """A sum over examples: what flows left of the mean."""

    loss: Tensor  # [micro-batches], in the order of time
    weight: Tensor  # [micro-batches]
    aux: Aux | None  # what the user's loss returns beside
    grads: Slots  # at this place of the chain; where sums are exact, integers from the first sum on
    bad: Tensor | None = None  # [leaves] int64, only while looking for it: values that are not finite
    moved: tuple[Tensor, ...] = ()  # the model state that each micro-batch left, by leaf [micro-batches, ...]
    used: Tensor | None = None  # [leaves] int64: micro-batches that had a gradient for it, where that counts
    # of gradients in integers (exact.py): the code of every leaf's largest value; None: gradients are as born
    tops: Tensor | None = None
    high: Slots | None = None  # of gradients in integers: the parts of large values, where the first sum has left them
    micros: Tensor | None = None  # 0-d int64, micro-batches of the global batch; None: as many as places


class Value(NamedTuple):
    """A value: what flows right of the mean, and what nonlinear transforms read."""

    loss: Tensor  # 0-d, as all that follow but aux and grads: the mean over the update's weight
    weight: Tensor
    aux: Tree  # the user's sums and rows over all micro-batches; None without has_aux
    grads: Slots  # at this place of the chain
    factor: Tensor  # still to be multiplied into grads: mean, unscale and clip touch only this
    norm: Tensor | None  # of factor * grads; None once a transform has rewritten grads
    ok: Tensor  # bool: may this update be applied?
    bad: Tensor | None = None  # [2] int64, only while looking for it: leaf and rank of the first that is not finite
    logs: dict[str, Tensor] = {}  # scalars for the metrics: scale, lr
    used: Tensor | None = None  # bool [leaves]: had any micro-batch of any rank a gradient for it? None: it counts not


class Updated(NamedTuple):
    """New parameters: what flows right of the last optimizer."""

    loss: Tensor
    weight: Tensor
    aux: Tree
    params: Slots  # at this place of the chain: the masters, and their views once a bracket has closed
    norm: Tensor  # of the mean gradient
    ok: Tensor
    bad: Tensor | None = None
    logs: dict[str, Tensor] = {}


Out = Sum | Value | Updated  # what a gradient returns, by the phase of its layout
Phase = Literal["sum", "value", "updated"]


class Seed(NamedTuple):
    """What flows from the step to the gradient, right to left through the chain."""

    cotangent: Tensor  # seed of the backward pass
    key: int  # randomness of this update; rng.UNKNOWN where the state's key cannot be read
    index: int = 0  # type: ignore[assignment]  # global, of the micro-batch; filled in digit by digit
    look: bool = False  # count non-finite values per leaf, to name the first
    at: tuple[int, int] = (0, 0)  # the run's key and the number of this update: what wires of views draw from
    of: int = 1  # micro-batches of an update
    grid: Grid | None = None  # units in which gradients are counted, where sums are exact
    micros: int | None = None  # of the global batch, where there are places for more; None: as many as places

    @property
    def hole(self) -> bool:
        """Is this place empty? Then a copy of another micro-batch runs, and counts for nothing."""
        return self.micros is not None and self.index >= self.micros


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
    cut: Tree = field(default=0, compare=False)  # of the batch: a prefix tree of the dims of rows (rows.py)

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

    mesh: Mesh
    policy: Policy
    edges: dict[str, Edge]  # by mesh axis, brackets first and outermost first: how it is crossed
    donate: bool = False  # may the state be updated in place?
    prefetch: bool = True  # does the next block's gather start while one computes?
    early: Early | None = None  # what the first updates are looked at for
    differentiable: bool = False  # is every leaf of a step a function of every other, for torch.func?
    model: Model | None = None  # the form of the model's own state
    keeps: bool = False  # is a leaf that nobody used left as it is?
    sums: str = "tree"  # how gradients are added; every edge has it from here
    capture: Capture | None = None  # what a loss and its gradient were recorded as; None: they run as written
    link: Link = Link()  # between ranks: how many bytes are worth a message of their own

    @property
    def exact(self) -> bool:
        """Are gradients added as integers?"""
        return self.sums == "exact"

    @property
    def rules(self) -> dict[str, Rules]:
        """Mesh axis -> how its bracket cuts leaves, outermost first; axes without a bracket are not named."""
        return {axis: edge.rules for axis, edge in self.edges.items() if edge.rules is not None}


Apply = Callable[["Slots", State, Tree, Seed], tuple[Out | None, State]]  # (views at rest, state, batch, seed)


class Grad(NamedTuple):
    """A stateful gradient: pure functions, the layout of what they return, and the chain so far."""

    init: Callable[[Lazy], State]
    view: Callable[[Slots, tuple[int, ...]], Slots]  # (views at rest, key of the update) -> whole leaves for a forward
    apply: Apply
    layout: Layout
    names: tuple[str, ...]
    env: Env
    arrows: tuple[Layout, ...] = ()  # the layout right of every name
    streams: bool = False  # does an accumulate to the left take one micro-batch a call?
    # what a printed chain says of its optimizers, where the place of the parameters is known, and where it is not
    notes: Callable[[Where | None], list[str]] = lambda where: []
    fresh: Apply | None = None  # whose gradients lie in memory that nobody else has seen

    @property
    def owned(self) -> bool:
        """May what is right of it write into the gradients? Not where a transform that may keep them has seen them."""
        return self.fresh is self.apply


Transform = Callable[[Grad], Grad]  # wraps everything to its left in the chain


class _State(NamedTuple):
    params: Slots  # the masters: this rank's part, in policy.params
    views: Slots | tuple[()] | None  # wider copies at rest in policy.compute; none where a view is the cast master
    chain: State
    step: Tensor  # calls that closed an update, skipped ones included; -1 - n once donated at n
    updates: Tensor  # applied updates
    key: Tensor  # seed of the run's randomness


class TrainState(_State):
    """A run as a value: everything that changes the trajectory is a leaf of it.

    Without views there is no leaf in their place, not a None that `tree_map` would hand to a function of tensors.
    """

    __slots__ = ()

    def __new__(
        cls, params: Slots, views: Slots | None, chain: State, step: Tensor, updates: Tensor, key: Tensor
    ) -> Self:
        """As the fields say."""
        return super().__new__(cls, params, () if views is None else views, chain, step, updates, key)

    @classmethod
    def _make(cls, values: Iterable[Any]) -> Self:  # type: ignore[override]  # it goes through __new__
        return cls(*values)

    @property
    def views(self) -> Slots | None:
        """Wider copies of the masters at rest; None where a view is the cast master."""
        return self[1] or None

    @property
    def model_state(self) -> Tree:
        """The model's own state, as the loss has it; None where it has none."""
        own = self.chain.get("model_state")
        return None if own is None else own.values


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
    aux: Tree = None  # what the loss returned beside: sums, and tensors by their rule

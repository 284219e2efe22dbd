"""The types everything stands on: what flows through a chain, and what a chain is checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from torch import Tensor

if TYPE_CHECKING:  # floors above this one, of which only the names are needed
    from funczero.comm.edge import Edge
    from funczero.core.policy import Policy
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
    grads: Slots  # at this place of the chain
    bad: Tensor | None = None  # [leaves] int64, only while looking for it: values that are not finite
    moved: tuple[Tensor, ...] = ()  # the model state that each micro-batch left, by leaf [micro-batches, ...]
    used: Tensor | None = None  # [leaves] int64: micro-batches that had a gradient for it, where that counts


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


Transform = Callable[[Grad], Grad]  # wraps everything to its left in the chain


class Group(NamedTuple):
    """Leaves that one set of rates moves in an update."""

    rates: Tree  # name -> number, or a float32 tensor where a schedule was read on an accelerator
    leaves: tuple[int, ...] | None = None  # their numbers; None: all that the optimizer has


class Reading(NamedTuple):
    """The rates of one update, read from the state before anything is written."""

    groups: list[Group]
    rates: Tree  # what the state keeps of them after the update; None where they are kept elsewhere
    lr: Tensor  # for the metrics


class Smooth(NamedTuple):
    """An optimizer's formula once more, of plain torch operations that can be differentiated any number of times.

    Args:
      read: (state, params, ok) -> Reading, whose rates are 0-d tensors.
      leaf: (param, grad, moments, scalars) -> (param, moments) of one leaf's part, out of place, as if the update were
        applied; the gradient comes without its factor.
    """

    read: Callable[[Tree, Slots, Tensor], Reading]
    leaf: Callable[[Tensor, Tensor, list[Tensor], Tree], tuple[Tensor, list[Tensor]]]


Needs = Literal["elementwise", "leaf_norms", "leafwise", "whole", "more"]


class Asked(NamedTuple):
    """What a formula asks of leaves before it moves them, each like the pieces that it was given.

    Args:
      norms: [what][leaf]: tensors whose norm over the whole leaf is wanted.
      rows: [what][leaf]: tensors that are wanted whole, all of one dtype.
    """

    norms: list[list[Tensor]] = []
    rows: list[list[Tensor]] = []


class Found(NamedTuple):
    """What came back, for the same leaves."""

    shapes: list[tuple[int, ...]]  # of the whole leaves
    norms: list[list[Tensor]]  # [what][leaf], float64 and 0-d
    rows: list[Tensor]  # like the pieces: this rank's part of what `whole` returned


class Across(NamedTuple):
    """What a formula reads beyond each value's own place: norms of leaves, or leaves that are whole.

    Args:
      ready: (params, grads, moments, scalars) -> Asked, in place on lists of flat padded parts, one a leaf.
      whole: (the tensors of `Asked.rows` of one leaf, whole; its own states, in place; scalars) -> one tensor like the
        leaf, in the dtype of what was asked. It runs once a leaf, on the rank that owns it. None: nothing is exchanged.
      own: state -> those of its fields that lie with a leaf's owner (`deal.owned`).
      cost: shape of a leaf -> what `whole` takes for it, in any unit; leaves are dealt by it.
      dims: shape of a leaf -> how many trailing dims `whole` computes as one, each place in the other dims by itself,
        so that a leaf which is cut along those alone stays where it is.
      small: leaves of fewer elements are sent to all ranks and computed by each, and nothing goes back.
    """

    ready: Callable[[list[Tensor], list[Tensor], list[list[Tensor]], Tree], Asked]
    whole: Callable[[list[Tensor], list[Tensor], Tree], Tensor] | None = None
    own: Callable[[Tree], list[Tree]] = lambda state: []
    cost: Callable[[tuple[int, ...]], float] = prod
    dims: Callable[[tuple[int, ...]], int] = len
    small: int = 0


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
        nothing gives empty lists. With `across` it takes Found as well.
      by_leaf: are the pieces leaves in their shapes, rather than padded flat buffers?
      smooth: the same for fz.differentiable; None: it is refused there.
      across: what it needs of whole leaves; None: every value is moved by what lies at its own place.
    """

    read: Callable[[Tree, Slots | Tree, Tensor, bool], Reading]
    moments: Callable[[Tree], list[Tree]]
    scalars: Callable[[Tree, list[Tree], Tensor, Tensor], tuple[Tree, list[Tree]]]
    leaf: Callable[..., None]
    by_leaf: bool = False
    smooth: Smooth | None = None
    across: Across | None = None


class _Pair(NamedTuple):
    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    formula: Formula | None
    name: str
    needs: Needs | None


class GradientTransformation(_Pair):
    """optax's pair, unchanged; `formula` is the form that runs in place, on any piece.

    `init(params) -> state` and `update(updates, state, params) -> (updates, state)` are all that anybody's optimizer
    needs. `needs` is how much of a leaf moves a value of it, declared and never tried:

    - "elementwise": what lies at its own place; whole buffers may be handed to it.
    - "leaf_norms": its own place and exact norms of its leaf (a formula with `across`).
    - "leafwise": its leaf; each leaf is computed by itself.
    - "whole": all leaves at once.
    - "more": it needs whole leaves, and nothing says how; None: it does not say. Both run where leaves are whole.

    `elementwise=True` is "elementwise", and `elementwise=False` is "more".
    """

    __slots__ = ()

    def __new__(
        cls,
        init: Callable[[Tree], Tree],
        update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
        formula: Formula | None = None,
        name: str = "lift",
        needs: Needs | None = None,
        elementwise: bool | None = None,
    ) -> Self:
        """As the fields say."""
        told: dict[bool | None, Needs | None] = {True: "elementwise", False: "more", None: needs}
        return super().__new__(cls, init, update, formula, name, told[elementwise])

    @classmethod
    def _make(cls, values: Iterable[Any]) -> Self:  # type: ignore[override]  # it goes through __new__
        return cls(*values)

    @property
    def elementwise(self) -> bool | None:
        """Does each value depend on its own place alone? None where nothing says so."""
        return None if self.needs is None else self.needs == "elementwise"


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

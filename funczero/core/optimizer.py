"""What an optimizer is: optax's pair, and the formula behind it that runs on any piece of a tree of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from torch import Tensor

from funczero.core.types import Tree

if TYPE_CHECKING:  # a floor above this one, of which only the name is needed
    from funczero.layout.slots import Slots


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

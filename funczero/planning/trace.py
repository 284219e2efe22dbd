"""What a step does, in order: every message with its bytes, what is computed between them, and what exists meanwhile.

Messages are noted where they are counted in a run (`Sent`, `Ledger`), so that planned bytes are counted bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from funczero.core import tree
from funczero.layout.mesh import Axis, Mesh
from funczero.planning.live import Live
from funczero.world.inflight import InFlight
from funczero.world.ledger import Ledger
from funczero.world.sent import Key, Sent

PACKAGE = "funczero."
OUTSIDE = ("sums", "update")  # phases in which no gradient is taken or added over time
# what a storage is for: the innermost of these functions that was running when it appeared
INNER = {
    "funczero.comm.units": (
        ("gather", "gathered"),
        ("_gather", "gathered"),
        ("_joined", "gathered"),
        ("", "gradients"),
    ),
    "funczero.comm.collectives": (("all_gather", "gathered"), ("_landed", ""), ("", "gradients")),
    "funczero.gradients.arrivals": (("", "gradients"),),
    "funczero.gradients.source": (("close", "gradients"),),
    "funczero.gradients.call": (("LossCall", "activations"),),
    "funczero.gradients.gradient": (("_differentiate", "activations"),),
    "funczero.gradients.higher": (("", "activations"),),
    "funczero.transforms.accumulate": (("", "gradients"),),
    "funczero.transforms.exact": (("", "gradients"),),
    "funczero.transforms.feedback": (("", "wires"),),
    "funczero.transforms.update": (("", "update"),),
    "funczero.transforms.mean": (("", "values"),),
    "funczero.step.frozen": (("Frozen.on", "frozen"),),
}
# of what travels: whose it is
OUTER = {"summed": "gradients", "closed": "views"}


class Verb(NamedTuple):
    """One thing that a step does."""

    what: str  # "gather", "scatter", "sum", "exchange", "broadcast"; "wait"; or "compute"
    axis: str = ""
    form: str = ""  # dtype or wire
    nbytes: int = 0  # that this rank sends
    units: tuple[int, ...] = ()
    phase: str = ""  # "forward", "backward", "over time" (accumulate), "sums" or "update"
    flops: int = 0
    moved: int = 0  # bytes that are read and written by operations
    operations: int = 0
    of: int = -1  # of a wait: which message


WORDS = {"all_gather": "gather", "reduce_scatter": "scatter", "all_reduce": "sum"}


class Noted(Sent):
    """A count that also tells the trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def note(self, key: Key, nbytes: int, values: int) -> None:
        """As Sent's."""
        super().note(key, nbytes, values)
        self.trace.message(key, nbytes)


class Agreeing(Ledger):
    """A ledger whose ranks do the same, since there is only one plan."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def note(self, verb: str, axis: str, dtype: str = "", nbytes: int = 0, units: tuple[int, ...] = ()) -> None:
        """As Ledger's; tells the trace whose values travel."""
        self.trace.of_units(units)

    def agreed(self, table: list[int], groups: list[int] | None = None) -> None:
        """They do."""


class Landed(InFlight):
    """Nothing flies, so nothing is awaited at exit."""

    def note(self, sent: Tensor, got: Tensor) -> Tensor:
        """What was got."""
        return got


def on_mesh(sizes: dict[str, int], rank: int, device: torch.device, like: torch.device, trace: Trace) -> Mesh:
    """A mesh of a whole world on which this process is number `rank`, that sends nothing and tells a trace.

    Args:
      device: of the plan's tensors.
      like: of a run's.
    """
    axes, left = dict[str, Axis](), rank
    for name, n in reversed(sizes.items()):  # ranks lie in rows of the last axis
        axes[name], left = Axis(n, left % n, "planned" if n > 1 else ""), left // n
    ledger, world = Agreeing(trace), "planned" if prod(sizes.values()) > 1 else ""
    ledger.place, ledger.ranks = rank, prod(sizes.values())
    axes = dict(reversed(axes.items()))
    near = frozenset(axes)  # the form of a gather that holds more memory
    return Mesh(axes, device, Noted(trace), ledger, Landed(), world, True, near, stands_for=like.type)


class Trace:
    """Listens to a step that runs on tensors without values."""

    def __init__(self) -> None:
        """Nothing has happened."""
        self.live = Live(_kind)
        self.verbs: list[Verb] = []
        self.uncounted: dict[str, int] = {}  # operations that multiply, but of which nobody knows how much
        self.gradients = 0  # bytes of them that lie there once all micro-batches are added
        self._work, self._flying, self._inside = Verb("compute"), dict[int, int](), False

    # --- what is told
    def message(self, key: Key, nbytes: int) -> None:
        """A collective is launched."""
        self._worked()
        axis, verb, form = key
        self.verbs.append(Verb(WORDS.get(verb, verb), axis, form, nbytes, phase=self._phase()))

    def of_units(self, units: tuple[int, ...]) -> None:
        """The message that was just told is of these units."""
        if self.verbs and units:
            self.verbs[-1] = self.verbs[-1]._replace(units=units)

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation has run."""
        if self._inside and self._phase() in OUTSIDE:  # a gradient was taken
            self.gradients, self._inside = max(self.gradients, self.live.of("gradients")), False
        name = func.namespace
        if name == "_c10d_functional":
            self._sent(func, args, out)
        elif func is torch.ops.aten._foreach_copy_.default:
            self._copied(args[0], args[1])
        found = tree.tensors(out)
        new = [x for x in found if self._new(x)]
        if name == "_c10d_functional" or not new and not func._schema.is_mutable:
            return
        phase = self._phase()
        if phase != self._work.phase:
            self._worked()
        self._inside = phase not in OUTSIDE
        more = flops_of(func, args, kwargs, out)
        if more is None:
            self.uncounted[str(func)] = self.uncounted.get(str(func), 0) + 1
        moved = sum(x.nbytes for x in (*tree.tensors((args, kwargs)), *new))
        work = self._work
        self._work = work._replace(
            phase=phase, flops=work.flops + (more or 0), moved=work.moved + moved, operations=work.operations + 1
        )

    def ended(self) -> None:
        """The step is over."""
        self._worked()

    # --- how it is kept
    def _new(self, x: Tensor) -> bool:
        before = len(self.live.events)
        self.live.see(x)
        return len(self.live.events) > before

    def _copied(self, to: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """What goes from a backward into a buffer of gradients is a gradient itself."""
        for a, b in zip(to, sources, strict=True):
            source = self.live.see(b)
            if source.kind == "activations" and self.live.see(a).kind == "gradients":
                source.kind = "gradients"

    def _sent(self, func: Any, args: Sequence[Any], out: Tensor) -> None:
        if func is torch.ops._c10d_functional.wait_tensor.default:
            number = self._flying.pop(args[0].untyped_storage()._cdata, None)
            if number is not None:
                self._worked()
                self.verbs.append(Verb("wait", self.verbs[number].axis, of=number))
        else:
            self._flying[out.untyped_storage()._cdata] = len(self.verbs) - 1

    def _worked(self) -> None:
        if self._work.operations:
            self.verbs.append(self._work)
        self._work = Verb("compute")

    def _phase(self) -> str:
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        return phase_of(sys._getframe(1))


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """As torch's counter has it; None for what multiplies matrices and is not in its table."""
    packet = func._overloadpacket
    known = flop_registry.get(packet)
    if known is not None:
        return int(known(*args, **(kwargs or {}), out_val=out))
    own = OWN.get(packet)
    return own(args) if own is not None else None if packet in UNKNOWN else 0


def _attention(times: int) -> Any:
    """Attention on a CPU, which torch's table does not have: so many products of matrices of rows by rows."""

    def count(args: Any) -> int:
        q, k = args[times == 5], args[(times == 5) + 1]
        return int(times * 2 * prod(q.shape[:-1]) * k.shape[-2] * q.shape[-1])

    return count


def _grouped(args: Any) -> int:
    """A product of matrices whose rows, columns or sums lie in groups, as routed experts run it."""
    a, b = args[:2]
    in_groups = a.dim() > b.dim()  # of whose matrices the columns of b are dealt
    return int(2 * prod(a.shape[in_groups:]) * b.shape[-1])


def _vector(n: int) -> Any:
    """A product with a vector: twice the elements of argument n."""
    return lambda args: 2 * args[n].numel()


_aten = torch.ops.aten
OWN = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention(2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5),
    _aten._grouped_mm: _grouped,
    _aten.mv: _vector(0),
    _aten.addmv: _vector(1),
    _aten.dot: _vector(0),
    _aten.vdot: _vector(0),
}
# they multiply, and nobody counts
UNKNOWN = {_aten.cdist, _aten._cdist_forward, _aten._cdist_backward, _aten._trilinear}
UNKNOWN |= {_aten.mkldnn_rnn_layer, _aten.mkldnn_rnn_layer_backward}
UNKNOWN |= {_aten._fft_r2c, _aten._fft_c2c, _aten._fft_c2r}
UNKNOWN |= {_aten.linalg_qr, _aten._linalg_eigh, _aten._linalg_svd, _aten._linalg_solve_ex, _aten.linalg_inv_ex}
UNKNOWN |= {_aten.linalg_cholesky_ex, _aten.linalg_lu_factor_ex, _aten.linalg_solve_triangular}


def phase_of(frame: Any) -> str:
    """Which part of an update is running, by the package's own functions."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "funczero.gradients.source":
            return "forward"
        if name == "funczero.transforms.accumulate" and frame.f_code.co_name != "apply":
            return "over time"
        if name == "funczero.transforms.update" and frame.f_code.co_name == "fn":
            return "update"
        frame = frame.f_back
    return "sums"


def _kind() -> str:
    """What a storage that appears now is for."""
    return kind_of(sys._getframe(1))


def kind_of(frame: Any) -> str:
    """What is made in a frame is for."""
    found = ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(PACKAGE):
            code = frame.f_code.co_qualname
            if not found:
                found = next((kind for start, kind in INNER.get(module, ()) if code.startswith(start)), "")
            if module == "funczero.transforms.reduce" and code.endswith(".after"):
                return OUTER.get(code.partition(".")[0], found)
        frame = frame.f_back
    return found or "other"

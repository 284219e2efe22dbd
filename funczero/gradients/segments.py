"""A recorded line cut at its verbs: what lies between two of them is a segment, a function of tensors alone.

What crosses from one segment to another is memory of its own, never a view: a view is taken again where it is read.
So nothing holds a gathered buffer over a verb that lets it go, and like blocks have like segments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from funczero.gradients.recording import VERBS, NotCaptured, Stop, draws, opened, reopened

Node = Any  # an fx.Node, whose arguments may be of twenty types


class Verb(NamedTuple):
    """One verb of a line."""

    name: str
    given: tuple[Any, ...]  # its arguments: numbers, and slots where it is given tensors
    writes: tuple[int, ...]
    dies: tuple[int, ...]  # slots that nobody reads afterwards


class Segment(NamedTuple):
    """What is computed between two verbs."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    dies: tuple[int, ...]
    run: fx.GraphModule  # (tensors) -> a tuple of tensors
    form: str  # like segments have like forms


class Slot(NamedTuple):
    """In place of a tensor among a verb's arguments."""

    number: int


class Line(NamedTuple):
    """A recorded loss and its gradient."""

    steps: tuple[Segment | Verb, ...]
    inputs: tuple[int, ...]  # slots that are given
    constants: tuple[tuple[int, Tensor], ...]  # slots of tensors that the loss holds
    outputs: tuple[Slot | Any, ...]
    visits: tuple[Stop, ...]
    slots: int
    draws: bool  # does it draw from torch's generator?


def is_view(node: Node) -> bool:
    """Is it a view of another value?"""
    if node.target is operator.getitem:
        return is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Cut:
    """A graph under the knife."""

    def __init__(self, graph: fx.Graph, visits: Sequence[Stop]) -> None:
        self.graph, self.visits, self.number = graph, visits, dict[Any, int]()
        self.at: dict[Node, int] = {}  # the verbs before each node
        self.verbs: list[Node] = []
        self.places: dict[tuple[Any, int], int] = {}  # (verb, visit) -> its place among the verbs
        for node in graph.nodes:
            if node.target in VERBS:
                self.places[node.target, node.args[0] if isinstance(node.args[0], int) else -1] = len(self.verbs)
                self.verbs.append(node)
            source = node.args[0] if node.target is operator.getitem else None
            self.at[node] = self.at[source] if isinstance(source, fx.Node) else len(self.verbs)
        self.reopening = {node.args[0]: node for node in self.verbs if node.target is reopened}

    def slot(self, what: Any) -> int:
        """The number of a value: a node, or one of what a verb gives."""
        return self.number.setdefault(what, len(self.number))

    def computed(self, node: Node) -> bool:
        """Is it an operation of torch?"""
        verbs = node.target in VERBS or node.target is operator.getitem and node.args[0].target in VERBS
        return node.op == "call_function" and not verbs

    def base(self, node: Node, at: int) -> Any:
        """What a value that is no view is called in segment `at`: a leaf is read as it was opened last."""
        if node.target is not operator.getitem or node.args[0].target not in VERBS:
            return node
        verb, i = node.args
        if verb.target is opened and self.places.get((reopened, verb.args[0]), at) < at:
            verb = self.reopening[verb.args[0]]
        return verb, i


class _Piece:
    """A segment that is being built."""

    def __init__(self, cut: _Cut, at: int) -> None:
        self.cut, self.at, self.graph = cut, at, fx.Graph()
        self.local: dict[Any, Node] = {}
        self.reads: list[Any] = []
        self.wanted: dict[Node, None] = {}  # its own nodes that others read

    def value(self, node: Node) -> Node:
        """A value here: its own, a view that is taken again, or an input."""
        if self.cut.computed(node) and (self.cut.at[node] == self.at or is_view(node)):
            if node not in self.local:
                self.add(node)
            return self.local[node]
        if self.cut.computed(node) and (written := _written_by(node)):
            return self.value(written[0])  # in place: the memory that it wrote into
        base = self.cut.base(node, self.at)
        if base not in self.local:
            self.local[base] = self.graph.placeholder(f"x{len(self.reads)}")
            self.local[base].meta["val"] = node.meta["val"]
            self.reads.append(base)
        return self.local[base]

    def add(self, node: Node) -> None:
        """One operation."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        self.local[node] = self.graph.create_node(node.op, node.target, args, kwargs)
        self.local[node].meta["val"] = node.meta.get("val")

    def finished(self) -> list[Any]:
        """Without what nobody reads; what it reads itself."""
        self.graph.output(tuple(self.local[n] for n in self.wanted))
        self.graph.eliminate_dead_code()
        for base in [b for b in self.reads if not self.local[b].users]:
            self.graph.erase_node(self.local[base])
            self.reads.remove(base)
        return self.reads


def cut(graph: fx.Graph, visits: Sequence[Stop], constant: Callable[[str], Tensor], params: int) -> Line:
    """A recorded graph as segments and verbs.

    Args:
      constant: by the name that a graph has for it.
      params: how many of its first arguments are parameters.

    Raises:
      NotCaptured: an operation sends, or writes into what it may only read.
    """
    whole, held, drew = _Cut(graph, visits), list[tuple[int, Tensor]](), False
    pieces = [_Piece(whole, at) for at in range(len(whole.verbs) + 1)]
    inputs, output = [], None
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs.append(whole.slot(node))
        elif node.op == "get_attr":
            value = constant(node.target)
            node.meta["val"] = value
            held.append((whole.slot(node), value))
        elif node.op == "output":
            output = node
        elif whole.computed(node):
            drew |= _checked(node)
            _written(node, inputs, params, whole.number)
            pieces[whole.at[node]].value(node)
    assert output is not None
    for args in (*(verb.args for verb in whole.verbs), output.args[0]):  # what verbs and the caller read
        for node in filter(whole.computed, _nodes(args)):
            pieces[whole.at[node]].wanted[node] = None
    for piece in reversed(pieces):
        for base in piece.finished():
            if isinstance(base, fx.Node) and whole.computed(base):
                pieces[whole.at[base]].wanted[base] = None
    return _line(whole, pieces, inputs, held, output.args[0], drew)


def _checked(node: Node) -> bool:
    """Does an operation draw?"""
    target: Any = node.target
    if target is operator.getitem:
        return False
    if not isinstance(target, torch._ops.OpOverload):
        raise NotCaptured(f"it calls {getattr(target, '__name__', target)}, which is no operation of torch")
    if target.namespace in ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor"):
        raise NotCaptured(f"it sends by itself ({target})")
    if "_rnn" in target.name():
        raise NotCaptured(f"{target} keeps what its backward reads only while torch records a graph")
    return draws(target, node.args, node.kwargs)


def _written_by(node: Node) -> list[Node]:
    """What an operation writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    said = node.target._schema.arguments
    given = dict(zip((a.name for a in said), node.args, strict=False)) | node.kwargs
    writes = [given.get(a.name) for a in said if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in writes if isinstance(x, fx.Node)]


def _written(node: Node, inputs: list[int], params: int, number: dict[Any, int]) -> None:
    """Refuse what writes into a parameter or into a tensor that the loss holds, through a view of it, too."""
    for x in _written_by(node):
        while x.op == "call_function" and x.target not in VERBS and (is_view(x) or _written_by(x)):
            x = _written_by(x)[0] if _written_by(x) else x.args[0]
        gives = x.target is operator.getitem and x.args[0].target in VERBS
        if gives or x.op == "get_attr" or x.op == "placeholder" and number[x] in inputs[:params]:
            raise NotCaptured(f"it writes ({node.target}) into a parameter, or into a tensor that it holds")


def _nodes(args: Any) -> list[Node]:
    found: list[Node] = []
    fx.map_arg(args, found.append)
    return found


def _line(
    whole: _Cut, pieces: list[_Piece], inputs: list[int], held: list[tuple[int, Tensor]], output: Any, drew: bool
) -> Line:
    """Pieces and verbs in their order, with the slots that each lets go."""
    ends = [*enumerate(verb.args for verb in whole.verbs), (len(whole.verbs), output)]
    read = {base for piece in pieces for base in piece.reads}
    read |= {whole.base(n, at) for at, args in ends for n in _nodes(args) if not whole.computed(n)}
    slotted = lambda at, args: fx.map_arg(
        args, lambda n: Slot(whole.slot(n if whole.computed(n) else whole.base(n, at)))
    )
    steps, stops = list[Segment | Verb](), list(whole.visits)
    for at, piece in enumerate(pieces):
        if any(node.op == "call_function" for node in piece.graph.nodes):
            run, reads = fx.GraphModule({}, piece.graph), tuple(whole.slot(base) for base in piece.reads)
            steps.append(Segment(reads, tuple(whole.slot(n) for n in piece.wanted), (), run, _form(run)))
        if at == len(whole.verbs):
            break
        verb = whole.verbs[at]
        n = len(whole.visits[verb.args[0]].leaves) if verb.target in (opened, reopened) else 0
        if verb.target is reopened and not any((verb, i) in read for i in range(n)):
            number = verb.args[0]  # its backward reads none of them
            stops[number] = stops[number]._replace(reads=False)
            continue
        writes = tuple(whole.slot((verb, i)) for i in range(n))
        steps.append(Verb(verb.target.__name__, slotted(at, verb.args), writes, ()))
    outputs = slotted(len(whole.verbs), tuple(output))
    lasting = {x.number for x in outputs if isinstance(x, Slot)} | {n for n, _ in held}
    return Line(_let_go(steps, lasting), tuple(inputs), tuple(held), outputs, tuple(stops), len(whole.number), drew)


def _slots(args: Any) -> list[int]:
    """Slots among a verb's arguments."""
    if isinstance(args, Slot):
        return [args.number]
    return [n for x in args for n in _slots(x)] if isinstance(args, (tuple, list)) else []


def _let_go(steps: list[Segment | Verb], lasting: set[int]) -> tuple[Segment | Verb, ...]:
    """Every step with the slots that nobody reads after it."""
    later, out = set(lasting), list[Segment | Verb]()
    for step in reversed(steps):
        touched = {*(step.reads if isinstance(step, Segment) else _slots(step.given)), *step.writes}
        out.append(step._replace(dies=tuple(touched - later)))
        later |= touched
    return tuple(reversed(out))


def _form(run: fx.GraphModule) -> str:
    """A segment in words: its code, and the tensors that it reads."""
    of = [n.meta["val"] for n in run.graph.nodes if n.op == "placeholder"]
    given = [f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device}" for x in of]
    return "\n".join([run.code, *given])

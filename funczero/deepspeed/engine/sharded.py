"""Stage 3: the user's own module runs, and holds no values between its calls.

The root, every module outside the units, and every unit have a `forward` of their own on the instance: the outermost call puts the leaves of
the open window (and closed Refs for what lies in units) in the parameters' places, a unit's opens that unit at the seam, and both put the
closed parameters back. Flags, hooks and attributes are the user's own, so they count.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funczero.comm.wire import Key
from funczero.core import tree
from funczero.core.types import Env, Grad, Out, Seed, TrainState
from funczero.deepspeed.engine.held import OLD, Closed, differentiate, leaves_under, named
from funczero.deepspeed.engine.zero_init import start_of
from funczero.gradients.gradient import close, open_rest, pullback
from funczero.gradients.layers import group_of, run_block, run_unit
from funczero.gradients.stateless import repeatable
from funczero.gradients.tape import Ref, Tape
from funczero.gradients.units import find_units, neighbours
from funczero.layout.mesh import P
from funczero.layout.slots import Slots
from funczero.step.check import recorded
from funczero.step.fits import at
from funczero.step.step import Step
from funczero.transforms.chain import Source


class Place(NamedTuple):
    """Where a parameter stands: in a module's _parameters, or in a list of its own, as an RNN keeps them (and makes anew)."""

    module: nn.Module
    box: str
    key: Any
    name: str
    closed: nn.Parameter

    def now(self) -> Any:
        """What stands there."""
        return self.module.__dict__[self.box][self.key]

    def put(self, x: Any) -> None:
        """Something else."""
        self.module.__dict__[self.box][self.key] = x


class Unit(NamedTuple):
    """A block that is opened by itself."""

    path: str
    places: list[Place]
    within: list[nn.Module]  # it, what is in it, and what it is in


class Sharded:
    """Stage 3: how a forward reads parameters that rest in shards; one set of leaves a window, shared by all its forwards."""

    kind = Closed

    def __init__(self, model: nn.Module) -> None:
        self.user = self.module = model
        self.named = named(model)
        self.units = find_units(model, None)
        self.owner = object()  # the home of every leaf that is opened for a window
        self.tape: Tape | None = None
        self.whole: list[Any] = []
        self.step: Any = None
        self.state: Any = None
        self.values: dict[str, Any] | None = None  # what is bound while a call is in the module
        self.places: list[Place] = []
        self.blocks: list[Unit] = []
        self.groups: list[tuple[int, ...]] = []
        self.again: set[int] = set()  # units that this call runs again in the backward
        self.sound: set[str] = set()
        self.modules: list[nn.Module] = []
        self.released = False

    def start(self, threshold: int) -> dict[str, Any]:
        """The parameters to begin with, ties kept; what zero.Init has cut stays cut, but for leaves under the threshold."""
        once: dict[int, Any] = {}
        return {n: once[id(p)] if id(p) in once else once.setdefault(id(p), start_of(p, p.numel() < threshold)) for n, p in self.named.items()}

    # --- the user's module
    def taken(self) -> None:
        """The module's parameters are closed now: its forwards become ours, and its buffers go where the parameters are."""
        device, self.modules = self.step.running().env.mesh.device, list(self.user.modules())
        for m in self.user.modules():
            m._buffers.update({k: b.to(device) for k, b in m._buffers.items() if b is not None and b.device != device})
        places = {m: self._places_of(m, path) for path, m in self.user.named_modules()}
        self.places = [p for ps in places.values() for p in ps]
        inside: set[nn.Module] = set()
        for path in self.units:
            above = [self.user.get_submodule(path[:i]) for i, c in enumerate(path) if c == "."]
            for name, block in self.user.get_submodule(path).named_children():
                if block not in inside:
                    own = list(block.modules())
                    inside.update(own)
                    unit = Unit(f"{path}.{name}", [p for m in own for p in places[m]], [self.user, *above, *own])
                    install(block, Method(self, block, "forward", len(self.blocks)))
                    self.blocks.append(unit)
        for m in self.user.modules():
            if m not in inside and type(m).forward is not nn.Module.forward:
                install(m, Method(self, m, "forward"))
        for name in ("state_dict", "load_state_dict"):
            install(self.user, Method(self, self.user, name))

    def _places_of(self, m: nn.Module, path: str) -> list[Place]:
        own = [Place(m, "_parameters", k, f"{path}.{k}".lstrip("."), p) for k, p in m._parameters.items() if p is not None]
        boxes = [(k, v) for k, v in m.__dict__.items() if type(v) is list]
        first = {id(p): n for n, p in reversed(self.named.items())}
        return own + [Place(m, k, i, first[id(p)], p) for k, v in boxes for i, p in enumerate(v) if isinstance(p, nn.Parameter) and id(p) in first]

    def release(self) -> None:
        """The module's own forwards again; its parameters stay closed."""
        self.released = True
        for m in self.modules:
            for name in ("forward", "state_dict", "load_state_dict"):
                method = m.__dict__.get(name)
                if isinstance(method, Method) and method.sharded is self:
                    uninstall(m, method)

    @contextmanager
    def bound(self, values: dict[str, Any]) -> Iterator[None]:
        """Values in the parameters' places."""
        odd = next((p.name for p in self.places if p.now() is not p.closed), None)
        if odd is not None:
            why = "was replaced after initialize (an assignment, or torch.func.functional_call), but the engine runs its own values"
            raise RuntimeError(f"engine: parameter {odd!r} {why}; write into it with deepspeed.zero.GatheredParameters, or run a copy of the module")
        self.values = values
        bind(self.places, values)
        try:
            yield
        finally:
            self.values = None
            for p in self.places:
                p.put(p.closed)

    # --- a window
    def renew(self, step: Step, state: TrainState) -> None:
        """After an update: the next forward opens new leaves."""
        self.step, self.state, self.tape, self.whole = step, state, None, []

    def _open(self) -> list[Any]:
        g, learn = self.step.running(), torch.is_grad_enabled()
        if learn and self.tape is not None:
            for u in list(self.tape.open):  # what a backward of another engine's loss left open is gathered again where it is read
                self.tape.drop(u)
            return self.whole
        views = self.step.fits.views(self.state)
        tape = Tape(views, (), g.env, look=False, differentiate=learn, at=at(self.state))
        whole = open_rest(tape)
        for x in (tape.port, *whole, *tape.leaves.values()):
            if isinstance(x, Tensor):
                x.home = self.owner  # type: ignore[attr-defined]
        if learn:
            self.tape, self.whole = tape, whole
        return whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, hooks included."""
        return self.inside(self.user, *args, **kwargs)

    def inside(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """fn with parameters in their places; a call that all ranks make alike."""
        if self.values is not None or self.released:
            return fn(*args, **kwargs)

        def call(state: TrainState, *batch: Any) -> Any:
            values = self.state.params.where.structure.unflatten(self._open())
            self.groups = [group_of([values[p.name] for p in u.places]) for u in self.blocks]
            asking = [m for m in self.modules if m.training and m.__dict__.get("gradient_checkpointing") is True]
            self.again = {i for i, u in enumerate(self.blocks) if any(m in u.within for m in asking)} if asking else set()
            with self.bound(values), unasked([m for m in asking if any(m in self.blocks[i].within for i in self.again)]):  # the seam does it
                return fn(*batch, **kwargs)

        said = "engine(batch)" if torch.is_grad_enabled() else "engine(batch) under no_grad"
        return recorded(said, call, self.step.running)(self.state, *args)

    def run(self, i: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Unit i: opened, bound, run, closed."""
        if self.released:
            return forward(*args, **kwargs)
        if self.values is None:
            return self.inside(partial(self.run, i, forward), args, kwargs)
        unit, groups, values = self.blocks[i], self.groups, self.values
        closed = {p.name: values[p.name] for p in unit.places}
        around = tuple(() if j is None else groups[j] for j in neighbours([u.path for u in self.blocks], i))

        def once(own: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = [p.now() for p in unit.places]  # in the backward of a unit that runs again these are the closed parameters
            bind(unit.places, own)
            try:
                return forward(*args, **kwargs)
            finally:
                for p, x in zip(unit.places, before, strict=True):
                    p.put(x)

        def twice(own: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = [(x, x._version) for x in tree.tensors((args, kwargs))]
            with unasked(unit.within):
                out = once(own, args, kwargs)
            if any(x._version != version for x, version in before):
                why = "changes an input in place; write x = x + y, or leave gradient checkpointing out"
                raise RuntimeError(f"engine: unit {unit.path!r} runs again in the backward (gradient checkpointing), but {why}")
            self._check_leaves(unit.path, out, [*own.values(), *(x for x, _ in before)])
            return out

        if i in self.again and torch.is_grad_enabled():
            return run_block(twice, tree.flatten(closed), groups[i], repeatable(unit.path, args, kwargs), {}, around, True)
        tape = next((r.tape for r in closed.values() if isinstance(r, Ref)), None)
        opened = lambda leaves: once({n: leaves[r.leaf] if isinstance(r, Ref) else r for n, r in closed.items()}, args, kwargs)
        return opened({}) if tape is None else run_unit(tape, groups[i], opened, *around)

    def _check_leaves(self, path: str, out: Any, own: list[Tensor]) -> None:
        """Refuse what a unit that runs again reads from outside: its gradient would be lost."""
        if path not in self.sound and torch.is_grad_enabled():
            known = {id(x) for x in own} | {id(y) for x in own if x.grad_fn is not None for y in leaves_under(x)}
            odd = next((y for x in tree.tensors(out) if x.grad_fn is not None for y in leaves_under(x) if id(y) not in known), None)
            if odd is not None:
                why = f"reads a tensor of shape {tuple(odd.shape)} that needs a gradient and comes from outside of it, so its gradient would be lost"
                raise TypeError(f"engine: unit {path!r}, which runs again in the backward (gradient checkpointing), {why}; hand it in, or leave checkpointing out")
            self.sound.add(path)

    def pull(self, loss: Tensor, retain: bool, over: float) -> Callable[[Tensor, bool, Key], Any]:
        """The vector-Jacobian product of a loss as this rank's part: units are scattered as their gradients are born."""
        tape, whole = self.tape, self.whole
        if tape is None:
            raise RuntimeError(OLD)

        def vjp(cotangent: Tensor, look: bool, key: Key) -> Any:
            tape.look = look
            wanted = {i: x for i, x in enumerate(whole) if isinstance(x, Tensor) and x.requires_grad} | {i: x for i, x in tape.leaves.items() if x.requires_grad}
            with tape.arrivals.collecting(look, retain, key):  # uses counted too high, a unit is only scattered later
                found = differentiate(loss, list(wanted.values()), cotangent, retain, over, (tape.port,), self.owner)
            grads: list[Any] = [None] * len(tape.whole.structure.leaves)
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
            return close(tape, grads)

        vjp.scatters = True  # type: ignore[attr-defined]
        return vjp

    def reread(self) -> None:
        """Nothing was shown."""

    def edited(self) -> str | None:
        """Nobody can write into what holds nothing."""
        return None

    def direct(self) -> str | None:
        """A parameter with a gradient of loss.backward()."""
        if self.tape is None:
            return None
        seen = [i for i, x in [*enumerate(self.whole), *self.tape.leaves.items()] if isinstance(x, Tensor) and x.grad is not None]
        leaves = self.tape.whole.structure.leaves
        return leaves[seen[0]].path if seen else leaves[0].path if self.tape.port.grad is not None else None


def bind(places: list[Place], values: dict[str, Any]) -> None:
    """Values in places, by name."""
    for p in places:
        p.put(values[p.name])


@contextmanager
def unasked(modules: list[nn.Module]) -> Iterator[None]:
    """Modules that do not checkpoint by themselves meanwhile."""
    asking = [m for m in modules if m.__dict__.get("gradient_checkpointing") is True]
    for m in asking:
        m.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for m in asking:
            m.__dict__["gradient_checkpointing"] = True


class Method:
    """A method on one module's instance that goes through the engine; it looks like the one it stands before, and copies do not have it."""

    def __init__(self, sharded: Sharded, module: nn.Module, name: str, unit: int | None = None) -> None:
        """unit: the module is this unit."""
        self.sharded, self.module, self.name, self.unit = sharded, module, name, unit
        self.own = module.__dict__.get(name)  # of somebody else, on the instance
        self.__wrapped__ = self.own or MethodType(getattr(type(module), name), module)
        self.__name__, self.__doc__ = name, self.__wrapped__.__doc__
        self.__self__ = module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.unit is not None:
            return self.sharded.run(self.unit, self.__wrapped__, args, kwargs)
        if self.name == "forward":
            return self.sharded.inside(self.__wrapped__, *args, **kwargs)
        if self.sharded.released:
            return self.__wrapped__(*args, **kwargs)
        if self.name == "load_state_dict":
            raise TypeError("engine.module.load_state_dict: the masters are sharded; write engine.load_module_state_dict(state_dict)")
        if self.sharded.values is not None:
            raise RuntimeError("engine.module.state_dict: it is called inside a forward, where units are closed; call it after it")
        with self.sharded.bound(whole_values(self.sharded.step, self.sharded.state)):
            return self.__wrapped__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(getattr(type(self.module), self.name), memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        return _class_method, (self.module, self.name)


def _class_method(module: nn.Module, name: str) -> Any:
    return MethodType(getattr(type(module), name), module)


def install(module: nn.Module, method: Method) -> None:
    """A method onto an instance; a module's own way of setting attributes is passed by."""
    module.__dict__[method.name] = method


def uninstall(module: nn.Module, method: Method) -> None:
    """What was there before."""
    if method.own is None:
        del module.__dict__[method.name]
    else:
        module.__dict__[method.name] = method.own


def whole_values(step: Step, state: TrainState, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Whole parameters from the masters, in the compute dtype. A collective."""
    dtype, whole, once = dtype or step.grad.env.policy.compute, step.params(state), dict[int, Tensor]()
    return {n: once.setdefault(id(x), x.to(dtype)) for n, x in whole.items()}


def module_state(step: Step, state: TrainState, module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's state_dict with whole parameters from the masters, cast to the compute dtype; in the module's own order. A collective."""
    whole, dtype = step.params(state), dtype or step.grad.env.policy.compute
    out: dict[str, Tensor] = {}
    for path, m in module.named_modules(remove_duplicate=False):
        at = f"{path}." if path else ""
        out.update({at + n: whole[at + n].to(dtype) for n, p in m._parameters.items() if p is not None})
        out.update({at + n: b.detach().clone() for n, b in m._buffers.items() if b is not None and n not in m._non_persistent_buffers_set})
    return out


def seam_pullback(batch: P, trainable: Callable[[str], bool], units: tuple[str, ...]) -> Source:
    """As pullback, with units. A pull that `scatters` is asked for this rank's part, because its backward has sent the units already;
    another one, as fz.pull's, returns whole gradients, which are scattered here."""
    plain = pullback(batch, trainable)

    def make(source: Source, env: Env) -> Grad:
        g = plain.make(source, env)

        def apply(views: Any, state: dict[str, Any], micro: Any, seed: Seed) -> tuple[Out, dict[str, Any]]:
            pull, loss, weight = micro
            loss, weight = (torch.as_tensor(x, device=views.buffers[0].device).detach() for x in (loss, weight))
            cotangent = seed.cotangent.to(loss.dtype)
            key = seed.key, seed.index
            if getattr(pull, "scatters", False):
                slots, bad = pull(cotangent, seed.look, key)
            else:
                slots, bad = _scattered(Tape(views, (), env, seed.look, key=key), pull(cotangent))
            return Out(loss[None], weight[None], None, slots, bad=bad), state

        return g._replace(apply=apply)

    return plain._replace(make=make, units=units)


def _scattered(tape: Tape, whole: Any) -> tuple[Slots, Tensor | None]:
    """A tree of whole gradients as this rank's part."""
    structure = tape.whole.structure
    grads: list[Any] = [None] * len(structure.leaves)
    for place, g in zip(structure.places, structure.treedef.flatten_up_to(whole), strict=True):
        if g is not None and not structure.frozen(place):
            grads[place] = g if grads[place] is None or g is grads[place] else grads[place] + g
    zero = lambda i: torch.zeros(structure.leaves[i].shape, dtype=tape.dtype, device=tape.port.device)
    for u, unit in enumerate(structure.units if tape.seam else ()):
        if unit.seam and not unit.frozen:
            tape.arrivals.put(u, [zero(i) if grads[i] is None else grads[i] for i in structure.members[u]])
    return close(tape, grads)

"""Stage 3: the user's own module runs, and holds no values between its calls.

The root, every module outside the units, and every unit have a `forward` of their own on the instance. The outermost
call puts the leaves of the open window (and closed Refs for what lies in units) in the parameters' places. A unit's
opens that unit at the seam. Both put the closed parameters back. Flags, hooks and attributes are the user's own, so
they count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from funczero.comm.exact import Grid
from funczero.comm.wire import Key
from funczero.core import tree
from funczero.core.exhausted import asking
from funczero.core.types import TrainState
from funczero.deepspeed.engine.graphs import OLD, differentiate, leaves_under
from funczero.deepspeed.engine.held import Closed, Held, named
from funczero.deepspeed.engine.instances import Block, Method, Spot, asks, bind, spots_of, unasked
from funczero.deepspeed.engine.seam import seam_pullback
from funczero.deepspeed.engine.values import whole_values
from funczero.deepspeed.engine.zero_init import start_of
from funczero.gradients.arrivals import Collected
from funczero.gradients.blocks import Again, Blocks
from funczero.gradients.layers import groups_of
from funczero.gradients.source import close
from funczero.gradients.tape import Tape
from funczero.gradients.units import find_units
from funczero.layout.spec import P
from funczero.step.calls import recorded
from funczero.step.fits import unused
from funczero.step.step import Step
from funczero.transforms.chain import Source
from funczero.world.entries import FORWARD


class ShardedParameters:
    """Parameters rest in shards, and one set of leaves a window is shared by all its forwards; see Holder."""

    kind: type[Held] = Closed

    def __init__(self, module: nn.Module) -> None:
        """module: the user's."""
        self.module = module
        self.named = named(module)
        self.units = find_units(module, None)
        self.modules: list[nn.Module] = []
        self.spots: list[Spot] = []
        self.blocks: list[Block] = []
        self.released = False
        self.sound: set[str] = set()  # paths of blocks that may run again
        # the window
        self.owner = object()  # the home of every leaf that is opened for a window
        self.step: Any = None
        self.state: Any = None
        self.tape: Tape | None = None
        self.rest: list[Any] = []  # what the tape gave for the leaves: tensors, and Refs inside units
        # the call that is in the module
        self.values: dict[str, Any] | None = None
        self.seam = Blocks([], [])
        self.again: set[int] = set()  # blocks that it runs again in the backward

    def source(self, batch: P, trainable: Callable[[str], bool]) -> Source:
        """This rank's part of the gradients: the backward has sent the units already."""
        return seam_pullback(batch, trainable, self.units)

    def start(self, threshold: int, step: Step) -> dict[str, Any]:
        """What zero.Init has cut stays cut, but for leaves under the threshold; where parameters rest in groups of
        ranks, as the group cuts them.
        """
        once: dict[int, Any] = {}
        size, index, _ = step.live_mesh.axes[step.grad.layout.rest[0]]
        for p in self.named.values():
            if id(p) not in once:
                once[id(p)] = start_of(p, p.numel() < threshold, size, index)
        return {n: once[id(p)] for n, p in self.named.items()}

    # --- the user's module
    def attach(self) -> None:
        """Its parameters are closed now: its forwards become ours, and its buffers go where the parameters are."""
        device, root = self.step.live_mesh.device, self.module
        self.modules = list(root.modules())
        for m in self.modules:
            moved = {k: b.to(device) for k, b in m._buffers.items() if b is not None and b.device != device}
            m._buffers.update(moved)
        first = {id(p): n for n, p in reversed(self.named.items())}
        spots = {m: spots_of(m, path, first) for path, m in root.named_modules()}
        self.spots = [s for each in spots.values() for s in each]
        inside: set[nn.Module] = set()
        for path in self.units:
            above = [root, *(root.get_submodule(path[:i]) for i, c in enumerate(path) if c == ".")]
            for name, block in root.get_submodule(path).named_children():
                if block not in inside:
                    own = list(block.modules())
                    inside.update(own)
                    Method(self, block, "forward", partial(self.run, len(self.blocks))).install()
                    self.blocks.append(Block(f"{path}.{name}", [s for m in own for s in spots[m]], [*above, *own]))
        for m in self.modules:
            if m not in inside and type(m).forward is not nn.Module.forward:
                Method(self, m, "forward", self.inside).install()
        Method(self, root, "state_dict", self._state_dict).install()
        Method(self, root, "load_state_dict", self._load_state_dict).install()

    def release(self) -> None:
        """The module's own methods again; its parameters stay closed."""
        self.released = True
        for m in self.modules:
            for name in ("forward", "state_dict", "load_state_dict"):
                method = m.__dict__.get(name)
                if isinstance(method, Method) and method.owner is self:
                    method.uninstall()

    @contextmanager
    def bound(self, values: dict[str, Any]) -> Iterator[None]:
        """Values in the parameters' places."""
        odd = next((s.name for s in self.spots if s.now() is not s.closed), None)
        if odd is not None:
            how = "an assignment, or torch.func.functional_call"
            why = f"was replaced after initialize ({how}), but the engine runs its own values"
            remedy = "write into it with deepspeed.zero.GatheredParameters, or run a copy of the module"
            raise RuntimeError(f"engine: parameter {odd!r} {why}; {remedy}")
        try:
            self.values = values
            bind(self.spots, values)
            yield
        finally:
            self.values = None
            for s in self.spots:
                s.put(s.closed)

    def _state_dict(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.released:
            return method(*args, **kwargs)
        if self.values is not None:
            why = "it is called inside a forward, where units are closed; call it after it"
            raise RuntimeError(f"engine.module.state_dict: {why}")
        with self.bound(whole_values(self.step, self.state)):
            return method(*args, **kwargs)

    def _load_state_dict(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.released:
            return method(*args, **kwargs)
        why = "the masters are sharded; write engine.load_module_state_dict(state_dict)"
        raise TypeError(f"engine.module.load_state_dict: {why}")

    # --- forwards
    def renew(self, step: Step, state: TrainState) -> None:
        """The next forward opens new leaves."""
        self.step, self.state, self.tape, self.rest = step, state, None, []

    def _open(self) -> list[Any]:
        """What a forward reads: the window's leaves, or without a gradient leaves of its own."""
        learn = torch.is_grad_enabled()
        if learn and self.tape is not None:
            self.tape.drop_all()  # a backward of another engine's loss may have left some open
            return self.rest
        tape = self.step.tape(self.state, differentiate=learn)
        rest = tape.open_rest()
        for x in (tape.port, *tape.tensors(rest).values()):
            x.home = self.owner
        if learn:
            self.tape, self.rest = tape, rest
        return rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, hooks included."""
        with asking(lambda: "in the forward, outside the units"):
            return self.inside(self.module, *args, **kwargs)

    def inside(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """fn with parameters in their places."""
        if self.values is not None or self.released:
            return fn(*args, **kwargs)

        def call(state: TrainState, *batch: Any) -> Any:
            unused("engine.module", state)
            values = self.state.params.where.structure.unflatten(self._open())
            groups = [groups_of([values[s.name] for s in b.spots]) for b in self.blocks]
            self.seam = Blocks([b.path for b in self.blocks], groups)
            askers = [m for m in self.modules if m.training and asks(m)]
            self.again = (
                {i for i, b in enumerate(self.blocks) if any(m in b.within for m in askers)} if askers else set()
            )
            ours = [m for m in askers if any(m in self.blocks[i].within for i in self.again)]  # the seam does it
            with self.bound(values), unasked(ours):
                return fn(*batch, **kwargs)

        name = FORWARD if torch.is_grad_enabled() else f"{FORWARD} under no_grad"
        return recorded(name, call, self.step.running)(self.state, *args)

    def run(self, i: int, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Block i: its unit is opened, bound, run and closed."""
        if self.released:
            return forward(*args, **kwargs)
        if self.values is None:
            return self.inside(lambda args, kwargs: self.run(i, forward, *args, **kwargs), args, kwargs)
        block, values = self.blocks[i], self.values

        def once(own: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = [s.now() for s in block.spots]  # of a block that runs again, in the backward: closed parameters
            try:
                bind(block.spots, own)
                return forward(*args, **kwargs)
            finally:
                for s, x in zip(block.spots, before, strict=True):
                    s.put(x)

        def by_itself(own: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with unasked(block.within):
                return once(own, args, kwargs)

        closed = {s.name: values[s.name] for s in block.spots}
        if i not in self.again or not torch.is_grad_enabled():
            return self.seam.run(i, closed, once, args, kwargs)
        again = Again("engine", "gradient checkpointing", "leave gradient checkpointing out", self._check_leaves)
        return self.seam.run(i, closed, by_itself, args, kwargs, again)

    def _check_leaves(self, path: str, out: Any, own: list[Tensor]) -> None:
        """Refuse what a block that runs again reads from outside: its gradient would be lost."""
        if path in self.sound or not torch.is_grad_enabled():
            return
        known = {id(x) for x in own} | {id(y) for x in own if x.grad_fn is not None for y in leaves_under(x)}
        graphs = (x for x in tree.tensors(out) if x.grad_fn is not None)
        odd = next((y for x in graphs for y in leaves_under(x) if id(y) not in known), None)
        if odd is not None:
            why = (
                f"reads a tensor of shape {tuple(odd.shape)} that needs a gradient and comes from outside of it, "
                "so its gradient would be lost; hand it in, or leave checkpointing out"
            )
            raise TypeError(f"engine: unit {path!r}, which runs again in the backward (gradient checkpointing), {why}")
        self.sound.add(path)

    # --- gradients
    def owns(self, leaf: Tensor) -> bool:
        """Opened for a window, of this state or of an older one."""
        return getattr(leaf, "home", None) is self.owner

    def pull(
        self, loss: Tensor, retain: bool, over: float, others: list[tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor, bool, Key, Grid | None], Collected]:
        """Gradients as this rank's part: units are scattered as their gradients are born."""
        tape, rest = self.tape, self.rest
        if tape is None:
            raise RuntimeError(OLD)

        def vjp(cotangent: Tensor, look: bool, key: Key, grid: Grid | None) -> Collected:
            wanted = {i: x for i, x in tape.tensors(rest).items() if x.requires_grad}
            with tape.collecting(
                look, retain=retain, key=key, grid=grid
            ):  # uses counted too high, a unit is only scattered later
                leaves = list(wanted.values())
                found = differentiate(
                    loss, leaves, cotangent, retain, over, others, (tape.port,), self.owner, tape.arrivals.amid
                )
            grads: list[Any] = [None] * len(tape.whole.structure.leaves)
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
            return close(tape, grads)

        vjp.scatters = True  # type: ignore[attr-defined]
        return vjp

    def refresh(self) -> None:
        """Nothing was shown."""

    def written(self) -> str | None:
        """Nobody can write into what holds nothing."""
        return None

    def stray_gradient(self) -> str | None:
        """By the .grad of the window's leaves."""
        if self.tape is None:
            return None
        leaves = self.tape.whole.structure.leaves
        seen = next((i for i, x in self.tape.tensors(self.rest).items() if x.grad is not None), None)
        if seen is not None:
            return leaves[seen].path
        return leaves[0].path if self.tape.port.grad is not None else None

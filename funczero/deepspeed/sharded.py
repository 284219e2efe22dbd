"""Stage 3: the user's module holds no values; a clone of it gathers unit by unit in every forward, through the machinery of `fz.stateless`."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from funczero.chain import Source
from funczero.check import recorded
from funczero.deepspeed.held import OLD, Closed, differentiate, named
from funczero.deepspeed.partition import start_of
from funczero.gradient import close, open_rest, pullback
from funczero.mesh import P
from funczero.snapshot import Snapshot
from funczero.spec import Slots
from funczero.stateless import Call
from funczero.step import Step
from funczero.tape import Tape
from funczero.types import Env, Grad, Out, Seed, TrainState
from funczero.units import find_units


class Sharded:
    """Stage 3: how a forward reads parameters that rest in shards; one set of leaves a window, shared by all its forwards."""

    kind = Closed

    def __init__(self, model: nn.Module) -> None:
        self.user, self.named = model, named(model)
        self.snapshot = Snapshot(model, find_units(model, None), remat=False)
        self.units = self.snapshot.lists
        self.module = Gathering(self)
        self.owner = object()  # the home of every leaf that is opened for a window
        self.tape: Tape | None = None
        self.whole: list[Any] = []
        self.step: Any = None
        self.state: Any = None

    def start(self, threshold: int) -> dict[str, Any]:
        """The parameters to begin with, ties kept; what zero.Init has cut stays cut, but for leaves under the threshold."""
        once: dict[int, Any] = {}
        return {n: once[id(p)] if id(p) in once else once.setdefault(id(p), start_of(p, p.numel() < threshold)) for n, p in self.named.items()}

    def taken(self) -> None:
        """The user's module is empty now; its buffers are the clone's."""
        modules = dict(self.user.named_modules(remove_duplicate=False))
        for (_, box, key, name), x in self.snapshot.buffers:
            owner = modules[name.rpartition(".")[0]]
            if box == "_buffers" and key in owner._buffers:
                owner._buffers[key] = x

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
        tape = Tape(views, (), g.env, look=False, differentiate=learn)
        whole = open_rest(tape)
        for x in (tape.port, *whole, *tape.leaves.values()):
            if isinstance(x, Tensor):
                x.home = self.owner  # type: ignore[attr-defined]
        if learn:
            self.tape, self.whole = tape, whole
        return whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, or another method of it, with parameters in their places."""
        return self.run("__call__", *args, **kwargs)

    def run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """A method of the module, on a copy that can read its parameters."""

        def call(state: TrainState, *batch: Any) -> Any:
            whole = self._open()
            bound = Call(self.snapshot, self.state.params.where.structure.unflatten(whole)).bound(self.snapshot)
            out = getattr(bound[id(self.snapshot.root)], method)(*batch, **kwargs)
            self._keep_buffers(bound)
            return out

        said = "engine(batch)" if method == "__call__" else f"engine.module.{method}(...)"
        return recorded(said if torch.is_grad_enabled() else f"{said} under no_grad", call, self.step.running)(self.state, *args)

    def _keep_buffers(self, bound: dict[int, nn.Module]) -> None:
        """A buffer that was replaced on the copy is replaced here; one that was changed in place is the same tensor anyway."""
        for (m, box, key, _), x in self.snapshot.buffers:
            now = getattr(bound[m], box)[key]
            if now is not x and isinstance(now, Tensor) and now.shape == x.shape:
                x.copy_(now.detach())

    def pull(self, loss: Tensor, retain: bool, over: float) -> Callable[[Tensor, bool], Any]:
        """The vector-Jacobian product of a loss as this rank's part: units are scattered as their gradients are born."""
        tape, whole = self.tape, self.whole
        if tape is None:
            raise RuntimeError(OLD)

        def vjp(cotangent: Tensor, look: bool) -> Any:
            tape.look = look
            wanted = {i: x for i, x in enumerate(whole) if isinstance(x, Tensor) and x.requires_grad} | {i: x for i, x in tape.leaves.items() if x.requires_grad}
            with tape.arrivals.collecting(look, retain):  # uses counted too high, a unit is only scattered later
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


class Gathering(nn.Module):
    """The module at stage 3: called like it, with its attributes and methods; parameters are gathered where they are read."""

    def __init__(self, sharded: Sharded) -> None:
        super().__init__()
        object.__setattr__(self, "_sharded", sharded)
        self.training = sharded.user.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self._sharded.forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Gathering:
        """Of the clone and of the user's module."""
        self.training = mode
        self._sharded.snapshot.root.train(mode)
        self._sharded.user.train(mode)
        return self

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The user's own, which have shapes and no values."""
        return self._sharded.user.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """With their values."""
        return self._sharded.user.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """Whole parameters in the compute dtype, and buffers, on every rank. A collective."""
        out = {} if destination is None else destination
        out.update({prefix + n: x for n, x in module_state(self._sharded.step, self._sharded.state, self._sharded.user).items()})
        return out

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Through the engine, which holds the masters."""
        raise TypeError("engine.module.load_state_dict: the masters are sharded; write engine.load_module_state_dict(state_dict)")

    def __getattr__(self, name: str) -> Any:
        root = self._sharded.snapshot.root
        found = getattr(root, name)
        if callable(found) and getattr(found, "__self__", None) is root:
            return lambda *args, **kwargs: self._sharded.run(name, *args, **kwargs)
        return found


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
            slots, bad = pull(cotangent, seed.look) if getattr(pull, "scatters", False) else _scattered(Tape(views, (), env, seed.look), pull(cotangent))
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

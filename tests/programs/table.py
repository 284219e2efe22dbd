"""What a program of this folder is: the same few updates with funczero, at any stage and world, and with plain torch.

A program is a file with a function `program()`. Most return a `Program`: a module, a loss, an optimizer. One that is
more than that (several chains, an inner loop) returns a `Pair` of two functions that it writes out itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import funczero as fz
from funczero import P
from funczero.testing import tree_hash

MICROS = 2  # micro-batches an update, over ranks and time
STAGES = 0, 1, 2, 3


class Program(NamedTuple):
    """A module that learns from one loss with one optimizer."""

    make: Callable[[], nn.Module]  # in float64, drawn from a generator that the caller has seeded
    loss: Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor]]  # (sum, weight)
    batch: Callable[[int], Any]  # of an update: its rows, an even number of them
    chain: Callable[[], tuple[Any, ...]]  # what works on the mean; the optimizer last
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    updates: int = 3
    options: Mapping[str, Any] = {}  # of fz.stateless
    grad: Mapping[str, Any] = {}  # of fz.value_and_grad
    same_bits: bool = True  # are its bits those of every stage and world?
    micros: bool = False  # is its loss another one of rows together? Then plain torch, too, goes by micro-batches

    def sharded(self, stage: int, accumulate: int) -> Any:
        """As one rank of a world: parameters and losses after the updates."""
        loss_fn, params = fz.stateless(seeded(self.make), self.loss, **self.options)
        grad = fz.value_and_grad(loss_fn, batch=P("data"), trainable=loss_fn.trainable, **self.grad)
        step = fz.train_step(
            *fz.zero(grad, *self.chain(), stage=stage, accumulate=accumulate), mesh={"data": -1}, policy="float64"
        )
        state, losses = step.init(params), []
        for t in range(self.updates):
            state, metrics = step(state, step.local_rows(self.batch(t)))
            losses.append(metrics.loss)
        return step.params(state), losses

    def plain(self) -> Any:
        """The same with plain torch, in one process."""
        module, losses = seeded(self.make), []
        optimizer = self.optimizer([p for p in module.parameters() if p.requires_grad])
        for t in range(self.updates):
            total, weight = map(sum, zip(*(self.loss(module, b) for b in self._micros(t)), strict=True))
            optimizer.zero_grad()
            (total / weight).backward()
            for p in module.parameters():  # what no row has reached learns from zeros, as in a larger batch
                p.grad = torch.zeros_like(p) if p.grad is None and p.requires_grad else p.grad
            optimizer.step()
            losses.append((total / weight).detach())
        return {n: p.detach() for n, p in module.named_parameters(remove_duplicate=False)}, losses

    def _micros(self, t: int) -> list[Any]:
        batch = self.batch(t)
        n = len(fz.tree.leaves(batch)[0]) // MICROS
        part = lambda i: fz.tree.map(lambda x: x[i * n : (i + 1) * n], batch)
        return [part(i) for i in range(MICROS)] if self.micros else [batch]


class Pair(NamedTuple):
    """A program that is written out twice; both return one tree of values."""

    sharded: Callable[[int, int], Any]  # (stage, accumulate): as one rank of a world
    plain: Callable[[], Any]
    same_bits: bool = True


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """`make()` with torch's generator seeded and put back: the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def results(name: str, stages: Sequence[int] = STAGES) -> dict[int, tuple[float, str, bool]]:
    """As one rank, by stage: how far a program is from plain torch, of the largest value; its hash; `same_bits`."""
    program = import_module(f"programs.{name}").program()
    want, size = [x for _, x in fz.tree.paths(program.plain())], dist.get_world_size() if dist.is_initialized() else 1
    largest, out = max(float(x.abs().max()) for x in want), {}
    for stage in stages:
        found = program.sharded(stage, MICROS // size)
        both = zip([x for _, x in fz.tree.paths(found)], want, strict=True)
        out[stage] = max(float((a - b).abs().max()) for a, b in both) / largest, tree_hash(found), program.same_bits
    return out

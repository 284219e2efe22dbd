"""Train steps of one GPT under names: funczero's chains and its engine, torch's own, DeepSpeed's and JAX's. A part of
`bench_step.py`.

    plain, plain-1t    one process alone, with as many threads as there are ranks, or one
    ddp, ddp-view      DistributedDataParallel; with gradients as views of its buckets
    fsdp, fsdp-keep    FSDP2; without resharding after the forward
    deepspeed0 to 3    DeepSpeed's engine at a ZeRO stage, where it is installed
    jax                shard_map in one process over as many host devices as there are ranks, parameters sharded
    stage0 to 3        funczero's donated step at a ZeRO stage
    hpz                parameters whole in every node of two ranks, the rest sharded over all: from four ranks on
    engine0 to 3       funczero's engine under DeepSpeed's name on a torch.nn.Module
    captured0 to 3     stage0 to 3 through fz.compile, where that exists
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from bench_models import ADAMW, GPT, Batch, Size, TrainStep, block, init_params, peer, summed_loss

PEERS = ["plain", "plain-1t", "ddp", "ddp-view", "fsdp", "fsdp-keep"]
OTHERS = [*(f"deepspeed{i}" for i in range(4)), "jax"]
OURS = [f"{kind}{i}" for kind in ("stage", "engine", "captured") for i in range(4)]
NAMES = [*PEERS, *OTHERS, *OURS[:4], "hpz", *OURS[4:]]
ALONE = ("plain", "jax")  # they run in the first process, while the others wait
LOCAL = ("ddp", "fsdp", "deepspeed")  # whose loss is that of a rank's own rows


class Contender(NamedTuple):
    """A train step, how it takes its rows out of the global batch, and (funczero) a counter of the bytes that one step
    sends.
    """

    step: TrainStep
    deal: Callable[[Batch], Batch]
    counted: Callable[[Batch], int] | None = None


def absent(name: str, ranks: int) -> str:
    """Why a contender cannot run here; "" where it can."""
    if name not in NAMES:
        raise ValueError(f"bench_step: there is no contender {name!r}; write some of {', '.join(NAMES)}")
    for package in ("deepspeed", "jax"):
        if name.startswith(package) and find_spec(package) is None:
            return f"{package} is not installed"
    if name == "hpz" and (ranks < 4 or ranks % 2):
        return "two nodes of two ranks are the least"
    if name.startswith("captured") and not hasattr(importlib.import_module("funczero"), "compile"):
        return "fz.compile does not exist yet"
    return ""


def imported(name: str) -> None:
    """All that a contender imports, before its memory is looked at."""
    if name.startswith(("stage", "hpz", "captured", "engine")):
        importlib.import_module("funczero")
        importlib.import_module("funczero.kernels.registry")
    if name.startswith("engine"):
        importlib.import_module("funczero.deepspeed")
    if name.startswith("deepspeed"):
        importlib.import_module("deepspeed")
    if name.startswith("jax"):
        importlib.import_module("bench_jax")


def make(name: str, s: Size, clip: float, bf16: bool) -> Contender | None:
    """The contender of that name; None on a rank that it leaves idle."""
    tree, rank, ranks = init_params(s), dist.get_rank(), dist.get_world_size()
    if name.startswith(ALONE) and rank:
        return None
    if name.startswith("plain"):
        return Contender(peer(name, tree, s, clip, bf16), lambda batch: batch)
    if name == "jax":
        import bench_jax

        return Contender(bench_jax.step_of(tree, s, clip, bf16, ranks), lambda batch: batch)
    if name == "hpz" or name.startswith(("stage", "captured")):
        return _chain(name, tree, s, clip, bf16)
    rows = slice(rank * s.B // ranks, (rank + 1) * s.B // ranks)
    deal = lambda batch: {k: v[rows] for k, v in batch.items()}
    if name.startswith(("engine", "deepspeed")):
        face = importlib.import_module("deepspeed" if name.startswith("deepspeed") else "funczero.deepspeed")
        return Contender(_engine(face, int(name[-1]), tree, s, clip, bf16), deal)
    return Contender(peer(name, tree, s, clip, bf16), deal)


def _chain(name: str, tree: dict[str, Any], s: Size, clip: float, bf16: bool) -> Contender:
    """funczero's donated step of a chain."""
    import funczero as fz

    def loss_fn(params: dict[str, Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        run = functools.partial(fz.layers, functools.partial(block, heads=s.heads), params["blocks"])
        return summed_loss(params, run, batch), torch.tensor(float(batch["y"].numel()))

    ranks, nodes = dist.get_world_size(), name == "hpz"
    grad = fz.value_and_grad(loss_fn, batch=fz.P(("node", "local") if nodes else "data"), units=("blocks",))
    adamw = fz.adamw(
        ADAMW["lr"], b1=ADAMW["betas"][0], b2=ADAMW["betas"][1], eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"]
    )
    parts = [*([fz.clip_by_global_norm(clip)] if clip else []), adamw]
    chain = fz.hpz(grad, *parts) if nodes else fz.zero(grad, *parts, stage=int(name[-1]), axis="data", accumulate=1)
    policy = f"params=float32,compute={'bfloat16' if bf16 else 'float32'},accumulate=float32"
    mesh = {"node": ranks // 2, "local": 2} if nodes else {"data": ranks}
    built = fz.train_step(*chain, mesh=mesh, policy=policy, check=0)
    update = fz.donate(fz.compile(built) if name.startswith("captured") else built)
    state = update.init(tree)

    def step(batch: Batch) -> torch.Tensor:
        nonlocal state
        state, metrics = update(state, batch)
        return metrics.loss

    def counted(batch: Batch) -> int:
        with fz.count_bytes(update) as sent:
            step(batch)
        return sum(sent.values())

    return Contender(step, update.local_rows, counted)


def _engine(face: ModuleType, stage: int, tree: dict[str, Any], s: Size, clip: float, bf16: bool) -> TrainStep:
    """A step of an engine, DeepSpeed's or the one that stands under its name here, by the same config."""
    theirs = face.__name__ == "deepspeed"
    params = {"lr": ADAMW["lr"], "betas": list(ADAMW["betas"]), "eps": ADAMW["eps"]}
    params |= {"weight_decay": ADAMW["weight_decay"]} | ({"torch_adam": True} if theirs else {})
    config = {
        "train_batch_size": s.B,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": params},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = face.initialize(model=GPT(tree, s.heads), config=config)

    def step(batch: Batch) -> torch.Tensor:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        return loss.detach().float() if theirs else engine.metrics.loss

    return step

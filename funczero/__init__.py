"""funczero: ZeRO as a chain of pure functions, on torch.

>>> import torch, torch.nn.functional as F
>>> import funczero as fz
>>> from funczero import P
>>> def loss_fn(params, batch):  # any pure function -> (sum of losses, sum of weights)
...     logits = torch.tanh(batch["x"] @ params["w1"]) @ params["w2"]
...     nll = F.cross_entropy(logits, batch["y"], reduction="none")
...     return (nll * batch["mask"]).sum(), batch["mask"].sum()
>>> step = fz.train_step(
...     fz.value_and_grad(loss_fn, batch=P("data")),  # a sum on every rank, unreduced over "data"
...     fz.accumulate(4),  # plus the other micro-batches
...     fz.shard("data",  # from here to the bracket's end: this rank's shard
...         fz.scale_loss(init=2**15),
...         fz.clip_by_global_norm(1.0),
...         fz.adamw(1e-1)),
...     mesh={"data": -1})  # all processes; {"data": 4} builds, prints and plans without any
>>> torch.manual_seed(0) and None
>>> params = {"w1": torch.randn(8, 16) / 8, "w2": torch.randn(16, 3) / 4}
>>> batch = {"x": torch.randn(32, 8), "y": torch.randint(3, (32,)), "mask": torch.ones(32)}
>>> state = step.init(params)
>>> for _ in range(20):
...     state, metrics = step(state, step.local_rows(batch))  # pure: same inputs, same bits
>>> metrics.loss.item() < 0.4, int(metrics.updates)
(True, 20)
"""

import importlib
from typing import TYPE_CHECKING

from funczero import data as data
from funczero import writers as writers
from funczero.checkpoint import Checkpointer as Checkpointer
from funczero.checkpoint import CheckpointError as CheckpointError
from funczero.checkpoint import Notice as Notice
from funczero.checkpoint.adapters import load_adapters as load_adapters
from funczero.checkpoint.adapters import save_adapters as save_adapters
from funczero.checkpoint.pretrained import from_pretrained as from_pretrained
from funczero.checkpoint.reshard import reshard as reshard
from funczero.checkpoint.stored import load_frozen as load_frozen
from funczero.checkpoint.stored import save_frozen as save_frozen
from funczero.comm.launch import count_bytes as count_bytes
from funczero.comm.memory import difference as difference
from funczero.comm.memory import feedback as feedback
from funczero.comm.quantised import fp8 as fp8
from funczero.comm.quantised import int4 as int4
from funczero.comm.quantised import int8 as int8
from funczero.comm.wire import Wire as Wire
from funczero.comm.wire import as_born as as_born
from funczero.comm.wire import cast as cast
from funczero.core import rng as rng
from funczero.core import tree as tree
from funczero.core.link import Link as Link
from funczero.core.optimizer import GradientTransformation as GradientTransformation
from funczero.core.policy import Policy as Policy
from funczero.core.types import ChainError as ChainError
from funczero.core.types import Grad as Grad
from funczero.core.types import Layout as Layout
from funczero.core.types import Metrics as Metrics
from funczero.core.types import Out as Out
from funczero.core.types import Seed as Seed
from funczero.core.types import Sum as Sum
from funczero.core.types import TrainState as TrainState
from funczero.core.types import Transform as Transform
from funczero.core.types import Updated as Updated
from funczero.core.types import Value as Value
from funczero.gradients.gradient import freeze as freeze
from funczero.gradients.gradient import value_and_grad as value_and_grad
from funczero.gradients.layers import gather as gather
from funczero.gradients.layers import layers as layers
from funczero.gradients.lora import lora as lora
from funczero.gradients.loss import mean_loss as mean_loss
from funczero.gradients.loss import per_row as per_row
from funczero.gradients.pullback import pull as pull
from funczero.gradients.pullback import pullback as pullback
from funczero.gradients.stateless import stateless as stateless
from funczero.layout.init import init as init
from funczero.layout.init import leaf as leaf
from funczero.layout.mesh import make_mesh as make_mesh
from funczero.layout.processes import init_distributed as init_distributed
from funczero.layout.slots import Slots as Slots
from funczero.layout.spec import P as P
from funczero.optim import adafactor as adafactor
from funczero.optim import adagrad as adagrad
from funczero.optim import adam as adam
from funczero.optim import adamw as adamw
from funczero.optim import eval_params as eval_params
from funczero.optim import from_torch as from_torch
from funczero.optim import lamb as lamb
from funczero.optim import lars as lars
from funczero.optim import lift as lift
from funczero.optim import lion as lion
from funczero.optim import matrices as matrices
from funczero.optim import muon as muon
from funczero.optim import param_groups as param_groups
from funczero.optim import schedule_free_adamw as schedule_free_adamw
from funczero.optim import schedule_free_sgd as schedule_free_sgd
from funczero.optim import schedules as schedules
from funczero.optim import sgd as sgd
from funczero.optim import shampoo as shampoo
from funczero.optim import soap as soap
from funczero.step.compile import compile as compile
from funczero.step.differentiable import differentiable as differentiable
from funczero.step.frozen import Frozen as Frozen
from funczero.step.frozen import beside as beside
from funczero.step.frozen import frozen as frozen
from funczero.step.generate import generate as generate
from funczero.step.profile import profile as profile
from funczero.step.sharded_loss import ShardedLoss as ShardedLoss
from funczero.step.sharded_loss import hessian as hessian
from funczero.step.sharded_loss import jacfwd as jacfwd
from funczero.step.sharded_loss import jacrev as jacrev
from funczero.step.sharded_loss import parts as parts
from funczero.step.sharded_loss import per_sample as per_sample
from funczero.step.sharded_loss import sharded_loss as sharded_loss
from funczero.step.sharded_loss import with_parts as with_parts
from funczero.step.step import Step as Step
from funczero.step.train_step import donate as donate
from funczero.step.train_step import train_step as train_step
from funczero.step.unroll import stack as stack
from funczero.step.unroll import unroll as unroll
from funczero.step.unroll import unstack as unstack
from funczero.step.zero import hpz as hpz
from funczero.step.zero import mics as mics
from funczero.step.zero import zero as zero
from funczero.step.zero import zeropp as zeropp
from funczero.transforms.accumulate import accumulate as accumulate
from funczero.transforms.average import averaged as averaged
from funczero.transforms.average import ema as ema
from funczero.transforms.chain import chain as chain
from funczero.transforms.clip import clip_by_global_norm as clip_by_global_norm
from funczero.transforms.clip import clip_by_value as clip_by_value
from funczero.transforms.loss_scale import scale_loss as scale_loss
from funczero.transforms.map_leaves import map_leaves as map_leaves
from funczero.transforms.mean import mean as mean
from funczero.transforms.noise import add_noise as add_noise
from funczero.transforms.partition import partition as partition
from funczero.transforms.project import project as project
from funczero.transforms.reduce import all_gather as all_gather
from funczero.transforms.reduce import all_reduce as all_reduce
from funczero.transforms.reduce import reduce_scatter as reduce_scatter
from funczero.transforms.shard import shard as shard

if TYPE_CHECKING:
    from funczero import deepspeed as deepspeed
    from funczero.deepspeed.config.build import from_deepspeed as from_deepspeed
    from funczero.planning.explain import explain as explain
    from funczero.planning.live import count_memory as count_memory
    from funczero.planning.plan import Plan as Plan
    from funczero.planning.plan import plan as plan
    from funczero.planning.search import search_plans as search_plans
    from funczero.planning.visualize import visualize as visualize
    from funczero.script.experiment import Experiment as Experiment
    from funczero.script.experiment import experiment as experiment
    from funczero.script.run import Run as Run

LAZY = {  # a program that uses none of them does not import the face, what plans, nor what scripts stand on
    "deepspeed": "funczero.deepspeed",
    "from_deepspeed": "funczero.deepspeed",
    "explain": "funczero.planning.explain",
    "count_memory": "funczero.planning.live",
    "Plan": "funczero.planning.plan",
    "plan": "funczero.planning.plan",
    "search_plans": "funczero.planning.search",
    "visualize": "funczero.planning.visualize",
    "experiment": "funczero.script.experiment",
    "Experiment": "funczero.script.experiment",
    "Run": "funczero.script.run",
}


def __getattr__(name: str) -> object:
    """DeepSpeed's face, plans and scripts, imported at their first use."""
    if name not in LAZY:
        raise AttributeError(f"module 'funczero' has no attribute {name!r}")
    found = importlib.import_module(LAZY[name])
    return found if name == "deepspeed" else getattr(found, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})

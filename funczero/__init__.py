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

from funczero import data as data
from funczero import rng as rng
from funczero import schedules as schedules
from funczero import tree as tree
from funczero.accumulate import accumulate as accumulate
from funczero.chain import chain as chain
from funczero.checkpoint import Checkpointer as Checkpointer
from funczero.checkpoint import CheckpointError as CheckpointError
from funczero.checkpoint import Notice as Notice
from funczero.clip import clip_by_global_norm as clip_by_global_norm
from funczero.clip import clip_by_value as clip_by_value
from funczero.collectives import count_bytes as count_bytes
from funczero.gradient import freeze as freeze
from funczero.gradient import per_row as per_row
from funczero.gradient import pull as pull
from funczero.gradient import pullback as pullback
from funczero.gradient import value_and_grad as value_and_grad
from funczero.init import init as init
from funczero.init import leaf as leaf
from funczero.layers import gather as gather
from funczero.layers import layers as layers
from funczero.loss_scale import scale_loss as scale_loss
from funczero.mean import mean as mean
from funczero.mesh import P as P
from funczero.mesh import init_distributed as init_distributed
from funczero.mesh import make_mesh as make_mesh
from funczero.optim import adamw as adamw
from funczero.optim import lift as lift
from funczero.optim import sgd as sgd
from funczero.policy import Policy as Policy
from funczero.reduce import all_gather as all_gather
from funczero.reduce import all_reduce as all_reduce
from funczero.reduce import reduce_scatter as reduce_scatter
from funczero.shard import shard as shard
from funczero.spec import Slots as Slots
from funczero.stateless import stateless as stateless
from funczero.step import Step as Step
from funczero.step import donate as donate
from funczero.step import train_step as train_step
from funczero.types import ChainError as ChainError
from funczero.types import Grad as Grad
from funczero.types import GradientTransformation as GradientTransformation
from funczero.types import Layout as Layout
from funczero.types import Metrics as Metrics
from funczero.types import Out as Out
from funczero.types import Seed as Seed
from funczero.types import TrainState as TrainState
from funczero.types import Transform as Transform
from funczero.zero import hpz as hpz
from funczero.zero import mics as mics
from funczero.zero import zero as zero

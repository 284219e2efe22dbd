"""`deepspeed.comm`: the world, its ranks and its collectives, as torch.distributed has them."""

from funczero.deepspeed.engine.ranks import ReduceOp as ReduceOp
from funczero.deepspeed.engine.ranks import __getattr__ as __getattr__
from funczero.deepspeed.engine.ranks import barrier as barrier
from funczero.deepspeed.engine.ranks import broadcast_module as broadcast_module
from funczero.deepspeed.engine.ranks import gather_texts as gather_texts
from funczero.deepspeed.engine.ranks import get_local_rank as get_local_rank
from funczero.deepspeed.engine.ranks import get_rank as get_rank
from funczero.deepspeed.engine.ranks import get_world_size as get_world_size
from funczero.deepspeed.engine.ranks import init_distributed as init_distributed
from funczero.deepspeed.engine.ranks import is_initialized as is_initialized

"""DeepSpeed's configuration file and its engine over the same chain: `import funczero.deepspeed as deepspeed`."""

from funczero.deepspeed import accelerator as accelerator
from funczero.deepspeed import checkpoint as checkpoint
from funczero.deepspeed import checkpointing as checkpointing
from funczero.deepspeed import comm as comm
from funczero.deepspeed import moe as moe
from funczero.deepspeed import ops as ops
from funczero.deepspeed import runtime as runtime
from funczero.deepspeed import utils as utils
from funczero.deepspeed import zero as zero
from funczero.deepspeed.config.arguments import add_config_arguments as add_config_arguments
from funczero.deepspeed.config.build import chain_of as chain_of
from funczero.deepspeed.config.build import from_deepspeed as from_deepspeed
from funczero.deepspeed.config.build import on_values as on_values
from funczero.deepspeed.config.explain import diff as diff
from funczero.deepspeed.config.explain import differences as differences
from funczero.deepspeed.config.key import ConfigError as ConfigError
from funczero.deepspeed.config.key import Key as Key
from funczero.deepspeed.config.keys import KEYS as KEYS
from funczero.deepspeed.config.optimizers import GroupRates as GroupRates
from funczero.deepspeed.config.optimizers import optimizer_of as optimizer_of
from funczero.deepspeed.config.optimizers import rates_of as rates_of
from funczero.deepspeed.config.resolve import resolve as resolve
from funczero.deepspeed.config.resolved import Config as Config
from funczero.deepspeed.config.resolved import Setting as Setting
from funczero.deepspeed.config.triad import Triad as Triad
from funczero.deepspeed.config.triad import WorldSize as WorldSize
from funczero.deepspeed.engine.device import get_accelerator as get_accelerator
from funczero.deepspeed.engine.engine import Engine as Engine
from funczero.deepspeed.engine.initialize import initialize as initialize
from funczero.deepspeed.engine.ranks import init_distributed as init_distributed
from funczero.deepspeed.optim.optimizer import EngineOptimizer
from funczero.deepspeed.utils import log_dist as log_dist
from funczero.deepspeed.utils import logger as logger

DeepSpeedEngine = Engine
DeepSpeedOptimizer = ZeROOptimizer = EngineOptimizer
DeepSpeedConfigError = ConfigError
dist = comm
__version__ = "0.19.8+funczero"  # of DeepSpeed, whose face this is
__version_major__, __version_minor__, __version_patch__ = 0, 19, 8
__git_hash__ = __git_branch__ = None
ABSENT = {
    "init_inference": (
        "there is no inference engine here; run engine.eval() under torch.no_grad(), or export the weights"
    ),
    "pipe": "there is no pipeline here; write a torch.nn.Module and stage 3",
    "PipelineModule": "there is no pipeline here; write a torch.nn.Module and stage 3",
    "OnDevice": "write with torch.device('meta'): ... and torch.set_default_dtype, or deepspeed.zero.Init",
    "DeepSpeedConfig": "write deepspeed.resolve(config, world), whose value(path) answers",
    "tp_model_init": "there is no tensor parallelism here; write stage 3",
}


def __getattr__(name: str) -> object:
    """What is not here, by name."""
    raise AttributeError(f"deepspeed.{name}: {ABSENT.get(name, 'it does not exist here')}")

"""`deepspeed.runtime.lr_schedules`: DeepSpeed's five schedules as schedulers of any torch optimizer."""

from funczero.deepspeed.config.options import SCHEDULERS
from funczero.deepspeed.optim.schedulers import LRRangeTest as LRRangeTest
from funczero.deepspeed.optim.schedulers import OneCycle as OneCycle
from funczero.deepspeed.optim.schedulers import WarmupCosineLR as WarmupCosineLR
from funczero.deepspeed.optim.schedulers import WarmupDecayLR as WarmupDecayLR
from funczero.deepspeed.optim.schedulers import WarmupLR as WarmupLR
from funczero.deepspeed.optim.tuning import add_tuning_arguments as add_tuning_arguments
from funczero.deepspeed.optim.tuning import get_config_from_args as get_config_from_args
from funczero.deepspeed.optim.tuning import get_lr_from_config as get_lr_from_config

VALID_LR_SCHEDULES = list(SCHEDULERS)
LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = SCHEDULERS
WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "log", "linear"
globals().update({name.upper(): name for known in SCHEDULERS.values() for name in known})  # WARMUP_NUM_STEPS, ...

"""`deepspeed.runtime.lr_schedules`: DeepSpeed's five schedules as schedulers of any torch optimizer."""

from funczero.deepspeed.config.options import SCHEDULERS
from funczero.deepspeed.optim.schedulers import LRRangeTest as LRRangeTest
from funczero.deepspeed.optim.schedulers import OneCycle as OneCycle
from funczero.deepspeed.optim.schedulers import WarmupCosineLR as WarmupCosineLR
from funczero.deepspeed.optim.schedulers import WarmupDecayLR as WarmupDecayLR
from funczero.deepspeed.optim.schedulers import WarmupLR as WarmupLR
from funczero.deepspeed.optim.schedulers import add_tuning_arguments as add_tuning_arguments
from funczero.deepspeed.optim.schedulers import get_config_from_args as get_config_from_args

VALID_LR_SCHEDULES = list(SCHEDULERS)

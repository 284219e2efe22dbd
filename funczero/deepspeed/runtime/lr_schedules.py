"""`deepspeed.runtime.lr_schedules`: DeepSpeed's five schedules as schedulers of any torch optimizer."""

from funczero.deepspeed.optim.schedulers import LRRangeTest as LRRangeTest
from funczero.deepspeed.optim.schedulers import OneCycle as OneCycle
from funczero.deepspeed.optim.schedulers import WarmupCosineLR as WarmupCosineLR
from funczero.deepspeed.optim.schedulers import WarmupDecayLR as WarmupDecayLR
from funczero.deepspeed.optim.schedulers import WarmupLR as WarmupLR

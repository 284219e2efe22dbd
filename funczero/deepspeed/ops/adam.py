"""`deepspeed.ops.adam`: client optimizers by DeepSpeed's names."""

from funczero.deepspeed.optim.fused_adam import DeepSpeedCPUAdam as DeepSpeedCPUAdam
from funczero.deepspeed.optim.fused_adam import FusedAdam as FusedAdam

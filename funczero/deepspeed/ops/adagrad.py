"""`deepspeed.ops.adagrad`: a client optimizer by DeepSpeed's name."""

from funczero.deepspeed.optim.fused_adam import DeepSpeedCPUAdagrad as DeepSpeedCPUAdagrad

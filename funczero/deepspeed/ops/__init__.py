"""Places where user code looks for DeepSpeed's optimizers."""

from funczero.deepspeed.ops import adam as adam

"""Places where user code looks for DeepSpeed's optimizers."""

from funczero.deepspeed.ops import adagrad as adagrad
from funczero.deepspeed.ops import adam as adam
from funczero.deepspeed.ops import lamb as lamb
from funczero.deepspeed.ops import lion as lion

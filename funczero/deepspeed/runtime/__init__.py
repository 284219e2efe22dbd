"""Places where user code looks for parts of DeepSpeed's runtime."""

from funczero.deepspeed.runtime import activation_checkpointing as activation_checkpointing
from funczero.deepspeed.runtime import base_optimizer as base_optimizer
from funczero.deepspeed.runtime import engine as engine
from funczero.deepspeed.runtime import lr_schedules as lr_schedules
from funczero.deepspeed.runtime import utils as utils
from funczero.deepspeed.runtime import zero as zero

"""`deepspeed.runtime.utils`: small things that scripts call."""

from funczero.deepspeed.engine.memory import clip_grad_norm_ as clip_grad_norm_
from funczero.deepspeed.engine.memory import memory_status as memory_status
from funczero.deepspeed.engine.memory import move_to_device as move_to_device
from funczero.deepspeed.engine.memory import see_memory_usage as see_memory_usage

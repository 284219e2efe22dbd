"""`deepspeed.runtime.activation_checkpointing`: another place of deepspeed.checkpointing."""

from funczero.deepspeed.runtime.activation_checkpointing import checkpointing as checkpointing

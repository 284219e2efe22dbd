"""`deepspeed.runtime.activation_checkpointing.checkpointing`: activations computed again in the backward."""

from funczero.deepspeed.engine.activations import checkpoint as checkpoint
from funczero.deepspeed.engine.activations import configure as configure
from funczero.deepspeed.engine.activations import is_configured as is_configured

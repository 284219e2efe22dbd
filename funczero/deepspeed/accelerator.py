"""`deepspeed.accelerator`: what user code asks about its device."""

from funczero.deepspeed.engine.device import Accelerator as Accelerator
from funczero.deepspeed.engine.device import get_accelerator as get_accelerator

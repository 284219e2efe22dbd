"""`deepspeed.zero`: parameters opened for reading and writing, and modules that are cut while they are built."""

from funczero.deepspeed.engine.external import register_external_parameter as register_external_parameter
from funczero.deepspeed.engine.external import unregister_external_parameter as unregister_external_parameter
from funczero.deepspeed.engine.gathered import GatheredParameters as GatheredParameters
from funczero.deepspeed.engine.held import ZeroParamStatus as ZeroParamStatus
from funczero.deepspeed.engine.zero_init import Init as Init

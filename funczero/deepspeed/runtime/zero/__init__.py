"""`deepspeed.runtime.zero`: another place of deepspeed.zero."""

from funczero.deepspeed.runtime.zero import partition_parameters as partition_parameters
from funczero.deepspeed.zero import GatheredParameters as GatheredParameters
from funczero.deepspeed.zero import Init as Init
from funczero.deepspeed.zero import ZeroParamStatus as ZeroParamStatus
from funczero.deepspeed.zero import register_external_parameter as register_external_parameter
from funczero.deepspeed.zero import unregister_external_parameter as unregister_external_parameter

"""`deepspeed.utils.zero_to_fp32`: plain float32 weights out of an engine's checkpoint."""

from funczero.deepspeed.engine.fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict as convert_zero_checkpoint_to_fp32_state_dict,
)
from funczero.deepspeed.engine.fp32 import (
    get_fp32_state_dict_from_zero_checkpoint as get_fp32_state_dict_from_zero_checkpoint,
)
from funczero.deepspeed.engine.fp32 import load_state_dict_from_zero_checkpoint as load_state_dict_from_zero_checkpoint

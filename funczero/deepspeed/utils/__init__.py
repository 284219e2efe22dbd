"""`deepspeed.utils`: logger, RepeatingLoader, and whole values of parameters that are sharded."""

from funczero.deepspeed.engine.absent import absent
from funczero.deepspeed.engine.access import log_dist as log_dist
from funczero.deepspeed.engine.access import logger as logger
from funczero.deepspeed.engine.access import safe_get_full_fp32_param as safe_get_full_fp32_param
from funczero.deepspeed.engine.access import safe_get_full_grad as safe_get_full_grad
from funczero.deepspeed.engine.access import safe_get_full_optimizer_state as safe_get_full_optimizer_state
from funczero.deepspeed.engine.access import safe_get_local_fp32_param as safe_get_local_fp32_param
from funczero.deepspeed.engine.access import safe_get_local_optimizer_state as safe_get_local_optimizer_state
from funczero.deepspeed.engine.access import safe_set_full_fp32_param as safe_set_full_fp32_param
from funczero.deepspeed.engine.access import safe_set_full_optimizer_state as safe_set_full_optimizer_state
from funczero.deepspeed.engine.external import set_z3_leaf_modules as set_z3_leaf_modules
from funczero.deepspeed.engine.external import unset_z3_leaf_modules as unset_z3_leaf_modules
from funczero.deepspeed.engine.loader import RepeatingLoader as RepeatingLoader
from funczero.deepspeed.utils import groups as groups
from funczero.deepspeed.utils import logging as logging
from funczero.deepspeed.utils import numa as numa
from funczero.deepspeed.utils import zero_to_fp32 as zero_to_fp32

_SET = "gradients are values of the chain; write what changes them into the config, or multiply the loss"
safe_set_full_grad = absent("deepspeed.utils.safe_set_full_grad", _SET)
safe_set_local_grad = absent("deepspeed.utils.safe_set_local_grad", _SET)
safe_get_local_grad = absent("deepspeed.utils.safe_get_local_grad", "read safe_get_full_grad on all ranks")

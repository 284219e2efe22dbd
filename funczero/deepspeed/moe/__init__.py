"""`deepspeed.moe`: experts over ranks, which do not exist here; a module's own experts train like any parameters."""

from funczero.deepspeed.engine.absent import absent_class
from funczero.deepspeed.moe import utils as utils

MoE = absent_class("deepspeed.moe.MoE", "write the experts as submodules, with stage 3 and utils.set_z3_leaf_modules")

"""`deepspeed.ops.lion`: Lion stands in a config, or in a chain as fz.lion."""

from funczero.deepspeed.engine.absent import absent_class

INSTEAD = 'write "optimizer": {"type": "Lion"} in the config, or fz.lion in a chain'
DeepSpeedCPULion = absent_class("deepspeed.ops.lion.DeepSpeedCPULion", INSTEAD)
FusedLion = absent_class("deepspeed.ops.lion.FusedLion", INSTEAD)

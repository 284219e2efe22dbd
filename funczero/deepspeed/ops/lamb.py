"""`deepspeed.ops.lamb`: Lamb is a name in a config."""

from funczero.deepspeed.engine.absent import absent_class

FusedLamb = absent_class("deepspeed.ops.lamb.FusedLamb", 'write {"type": "Lamb"} in the config')

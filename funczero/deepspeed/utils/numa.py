"""`deepspeed.utils.numa`: which cores a process is given."""

from funczero.deepspeed.engine.absent import absent

INSTEAD = "write numactl before the command, or `funczero launch --bind_cores_to_rank`"
get_numactl_cmd = absent("deepspeed.utils.numa.get_numactl_cmd", INSTEAD)
get_numa_cores = absent("deepspeed.utils.numa.get_numa_cores", INSTEAD)

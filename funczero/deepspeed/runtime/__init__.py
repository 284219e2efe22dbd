"""Places where user code looks for parts of DeepSpeed's runtime."""

from funczero.deepspeed.runtime import lr_schedules as lr_schedules

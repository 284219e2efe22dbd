"""`deepspeed.runtime.engine`: the engine's class."""

from funczero.deepspeed.engine.engine import Engine as DeepSpeedEngine  # noqa: F401

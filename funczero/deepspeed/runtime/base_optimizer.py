"""`deepspeed.runtime.base_optimizer`: what an engine's optimizer is an instance of."""

from funczero.deepspeed.optim.optimizer import EngineOptimizer

DeepSpeedOptimizer = ZeROOptimizer = EngineOptimizer

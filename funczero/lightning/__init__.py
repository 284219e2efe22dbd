"""ZeRO for Lightning's two loops: `Trainer(strategy=FunczeroStrategy(stage=3))`, `Fabric(strategy=FabricStrategy())`.

Importing it registers the names "funczero" and "funczero_stage_0" to "funczero_stage_3" with both loops.
"""

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from funczero.lightning.fabric import FabricStrategy as FabricStrategy
from funczero.lightning.trainer import FunczeroStrategy as FunczeroStrategy

FabricStrategy.register_strategies(STRATEGY_REGISTRY)
FunczeroStrategy.register_strategies(StrategyRegistry)

"""ZeRO for Lightning's two loops: `Trainer(strategy=FunczeroStrategy(stage=3))`, `Fabric(strategy=FabricStrategy())`.

Importing it registers the names "funczero" and "funczero_stage_0" to "funczero_stage_3" with both.
"""

from funczero.lightning.trainer import FunczeroStrategy as FunczeroStrategy

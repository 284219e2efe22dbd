"""What a Trainer can be asked for that would not be right over engines: each by name, when training is set up."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

CALLBACKS = {
    "StochasticWeightAveraging": "it writes averages into parameters whose masters are the chain's",
    "WeightAveraging": "it swaps averages with parameters whose masters are the chain's",
    "EMAWeightAveraging": "it swaps averages with parameters whose masters are the chain's",
    "ModelPruning": "it replaces parameters by masked ones, which no optimizer of a chain has",
}
WHO = "FunczeroStrategy"


def check_trainer(trainer: Any, module: Any, strategy: Any, fits: bool) -> None:
    """Refuse what cannot be right.

    Raises:
      ValueError: it says what to leave out, or write instead.
    """
    stage = strategy.settings.stage
    if strategy._layer_sync is not None:
        why = "sums of batch norms over ranks inside a forward have not been tried here"
        raise ValueError(f"{WHO}: sync_batchnorm: {why}; leave it out")
    if getattr(module, "_compiler_ctx", None) is not None and stage == 3:
        why = "parameters of a compiled LightningModule would be values of its trace"
        raise ValueError(f"{WHO}: stage 3: {why}; compile blocks of it, or write stage 2")
    if not fits:
        return
    for c in trainer.callbacks:
        name = next((k.__name__ for k in type(c).__mro__ if k.__name__ in CALLBACKS), None)
        if name is not None:
            raise ValueError(f"{WHO}: callback {name}: {CALLBACKS[name]}; leave it out")
    if is_overridden("backward", module, LightningModule):
        why = "gradients are not written into .grad, so a backward of one's own would be lost"
        raise ValueError(f"{WHO}: {type(module).__name__}.backward is overridden, but {why}; leave it out")


def check_optimizers(optimizers: list[Any]) -> None:
    """Refuse a fit without an optimizer.

    Raises:
      ValueError: configure_optimizers returned None.
    """
    if any(type(o).__name__ == "_MockOptimizer" for o in optimizers):
        why = "configure_optimizers returned None, so nothing that the strategy knows of would be trained"
        raise ValueError(f"{WHO}: {why}; return the optimizer, or call trainer.validate")


def clip_of(limit: Any, algorithm: Any) -> dict[str, float]:
    """What an engine is asked for by Lightning's two words; empty where nothing is clipped.

    Raises:
      ValueError: another algorithm.
    """
    word = str(getattr(algorithm, "value", algorithm) or "norm")
    if not limit or limit <= 0:
        return {}
    if word not in ("norm", "value"):
        raise ValueError(f"clip_gradients: algorithm {word!r} does not exist; write 'norm' or 'value'")
    return {word: float(limit)}

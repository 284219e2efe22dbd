"""Where a config's tensorboard, csv_monitor and wandb write: DeepSpeed's tags over rows seen, so that a dashboard goes
on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.resolved import Config
from funczero.deepspeed.engine import ranks
from funczero.writers import END, Csv, TensorBoard, Tracker, Writer

TAGS = {"train_loss": "Train/Samples/train_loss", "lr": "Train/Samples/lr", "loss_scale": "Train/Samples/loss_scale"}
KINDS = ("tensorboard", "wandb", "csv_monitor")


class Monitor:
    """`engine.monitor.write_events([(tag, value, x), ...])`, on rank 0; elsewhere nothing.

    What a run writes again after it has loaded a checkpoint stands there twice, as with DeepSpeed.

    Source: DeepSpeed 0.19.8, monitor/monitor.py. Of its engines only the pipeline's writes train_loss there; earlier
    versions all did.
    """

    def __init__(self, config: Config) -> None:
        """Opens what the config enables; where it enables something, all ranks come here.

        Raises:
          ConfigError: rank 0 lacks a package, or cannot write there; on all ranks.
        """
        wanted = [kind for kind in KINDS if config.value(f"{kind}.enabled")]
        self.enabled, self.writers, why = bool(wanted), list[Writer](), ""
        for kind in wanted if ranks.get_rank() == 0 else ():
            try:
                self.writers.append(_opened(kind, config.block(kind)))
            except (ImportError, OSError) as e:
                why = f"{config.where(f'{kind}.enabled')}{e}; or write false"
                break
        told = ranks.gather_texts(why)[0] if wanted else ""
        if told:
            raise ConfigError(told)

    def write_events(self, event_list: Iterable[tuple[str, Any, int]]) -> None:
        """Numbers with their tags and their place on the axis.

        Raises:
          TypeError: a value is no number.
        """
        for tag, value, x in event_list if self.writers else ():
            for writer in self.writers:
                writer.log(int(x), {tag: value})

    def updated(self, samples: int, loss: Any, lr: float, scale: float | None) -> None:
        """An update has been made.

        Args:
          samples: rows seen so far.
          scale: of the loss, in float16.
        """
        values = {"train_loss": loss, "lr": lr, "loss_scale": scale}
        self.write_events([(TAGS[name], x, samples) for name, x in values.items() if x is not None])


def _opened(kind: str, block: dict[str, Any]) -> Writer:
    if kind == "wandb":
        try:
            import wandb
        except ImportError:
            raise ImportError("the package wandb is not installed; write pip install wandb") from None
        return Tracker(wandb.init(project=block["project"], group=block["group"], entity=block["team"]))
    folder = os.path.join(block["output_path"], block["job_name"])
    return TensorBoard(folder, after=END) if kind == "tensorboard" else Csv(folder, after=END)

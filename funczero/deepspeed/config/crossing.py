"""What ZeRO++'s keys say at stage 3: the mesh, and how its axes are crossed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from funczero.comm.quantised import int4, int8
from funczero.comm.wire import Wire, as_born
from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.resolved import Config

PREFIX = "zero_optimization.zero_"
HPZ, WEIGHTS, GRADIENTS = PREFIX + "hpz_partition_size", PREFIX + "quantized_weights", PREFIX + "quantized_gradients"
FROZEN = PREFIX + "quantized_nontrainable_weights"


class Crossing(NamedTuple):
    """How the ranks of a config lie, and what travels among them."""

    mesh: dict[str, int]
    axes: tuple[str, ...]  # that the batch is split over, in the order of ranks
    weights: Wire = as_born
    gradients: Wire = as_born
    frozen: Wire | None = None  # of weights that do not learn
    secondary: bool = False  # do parameters rest whole in every group of `local` ranks?

    @property
    def nested(self) -> bool:
        """Are there nodes and ranks within them?"""
        return len(self.axes) > 1


def crossing(config: Config, environ: Mapping[str, str] = os.environ) -> Crossing:
    """The mesh and the wires of a config; below stage 3 ZeRO++'s keys say nothing, as in DeepSpeed.

    Groups of zero_hpz_partition_size consecutive ranks hold the parameters. Quantised gradients are summed within a
    group, or within a host where there are no groups, before they cross; on a single host they travel as they are.

    Raises:
      ConfigError: the groups do not divide the world.

    Source: DeepSpeed 0.19.8, where gradients that are not quantised cross with the others.
    """
    size = config.world.size
    flat = Crossing({"data": size}, ("data",))
    if config.value("zero_optimization.stage") != 3:
        return flat
    group = min(config.value(HPZ), size)
    if size % group:
        why = f"groups of {group} ranks do not divide the world of {size}; write a divisor of {size}"
        raise ConfigError(f"{config.where(HPZ)}{why}")
    weights = int8(2048) if config.value(WEIGHTS) else as_born
    frozen = int8(2048) if config.value(FROZEN) else None
    host = int(environ.get("LOCAL_WORLD_SIZE", "0") or 0)
    within = group if group > 1 else host if config.value(GRADIENTS) and 1 < host < size and size % host == 0 else 1
    if within == 1:
        return flat._replace(weights=weights, frozen=frozen)
    gradients = int4(512) if config.value(GRADIENTS) else as_born
    mesh = {"node": size // within, "local": within}
    return Crossing(mesh, ("node", "local"), weights, gradients, frozen, group > 1)


def crossing_notes(config: Config) -> list[str]:
    """What ZeRO++'s keys mean here, where that is not what they say."""
    given = [path for path in (WEIGHTS, GRADIENTS, FROZEN) if config.value(path)] + [HPZ] * (config.value(HPZ) > 1)
    stage, how = config.value("zero_optimization.stage"), crossing(config)
    if given and stage != 3:
        return [f"{', '.join(given)} changes nothing at stage {stage}: nothing of ZeRO++ is there below stage 3"]
    out = []
    if GRADIENTS in given and how.gradients is as_born:
        out.append(f"{GRADIENTS} changes nothing: all ranks are on one host and in no groups, so no sum crosses any")
    if how.frozen is not None:
        out.append(f"{FROZEN}: weights that do not learn are rounded to {how.frozen} where they travel, and kept whole")
    packed = [f"{k} in {w}" for k, w in (("weights", how.weights), ("gradients", how.gradients)) if w is not as_born]
    if packed:
        out.append(f"{' and '.join(packed)} are rounded where they travel: other bits than without ZeRO++")
    return out

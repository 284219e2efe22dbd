"""Unmodified models of Hugging Face are plain torch's values at stages 0 and 3, and their dropout is one on any world.

Five of them; all of `hugging.MODELS` are the campaign's (tests/campaign/hugging_models.py).
"""

from __future__ import annotations

import hugging
import pytest
from cover import EACH

FIVE = "olmoe", "mamba", "resnet", "whisper", "clip"


@EACH
@pytest.mark.parametrize("name", FIVE)
def test_values_and_dropout(run_world, name, whole):
    """Without `whole` at one stage on each world, the next model at the others."""
    pytest.importorskip("transformers")
    few = {1: (0,), 2: (3,)} if FIVE.index(name) % 2 else {1: (3,), 2: (0,)}
    found = [
        result
        for world in (1, 2)
        for rank in run_world(world, hugging.results, name, (0, 3) if whole else few[world], timeout=180)
        for result in rank.values()
    ]
    assert max(far for far, _ in found) <= 1e-10, found
    assert len({bits for _, bits in found}) == 1, found

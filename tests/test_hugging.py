"""Unmodified models of Hugging Face are plain torch's values at stages 0 and 3, and their dropout is one on any world.

Five of them; all of `hugging.MODELS` are the campaign's (tests/campaign/hugging_models.py).
"""

from __future__ import annotations

import hugging
import pytest

FIVE = "olmoe", "mamba", "resnet", "whisper", "clip"


@pytest.mark.parametrize("name", FIVE)
def test_values_and_dropout(run_world, name):
    pytest.importorskip("transformers")
    found = [
        result
        for world in (1, 2)
        for rank in run_world(world, hugging.results, name, timeout=180)
        for result in rank.values()
    ]
    assert max(far for far, _ in found) <= 1e-10, found
    assert len({bits for _, bits in found}) == 1, found

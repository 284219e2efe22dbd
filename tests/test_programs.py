"""Every program of tests/programs/ is plain torch's at every stage and world, in float64; one hash where bits are."""

from __future__ import annotations

from pathlib import Path

import pytest
from cover import EACH, places
from programs import table

PROGRAMS = sorted(p.stem for p in (Path(__file__).parent / "programs").glob("*.py") if p.stem != "table")


@EACH
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_plain_torch_at_every_stage_and_world(run_world, name, whole):
    found, at = {}, places(name, PROGRAMS, whole)
    for world in (1, 2):
        stages = [stage for w, stage in at if w == world]
        for rank, by_stage in enumerate(run_world(world, table.results, name, stages)):
            found |= {(world, rank, stage): result for stage, result in by_stage.items()}
    assert max(far for far, _, _ in found.values()) <= 1e-10, found
    for worlds in [(1, 2)] if all(same for *_, same in found.values()) else [(1,), (2,)]:
        assert len({bits for (w, *_), (_, bits, _) in found.items() if w in worlds}) == 1, found


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_fits_on_a_page(name):
    lines = (Path(__file__).parent / f"programs/{name}.py").read_text().splitlines()
    assert len(lines) <= 100

"""Every stage is the reference: AdamW by hand on whole leaves in float64, with a clip, ragged weights and a skipped
overflow.
"""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH

from funczero.layout.processes import world_size

FORMS = {
    "whole": dict(units=()),
    "keep": dict(units=("blocks",)),
    "remat": dict(units=("blocks",), loss_fn=zoo.loss_remat),
}


def distance(run, truth):
    """The largest distance of a run's masters, losses and norms from the reference."""
    (masters, log, _, _), (want, losses, norms) = run, truth
    pairs = list(zip(torch.utils._pytree.tree_leaves(masters), torch.utils._pytree.tree_leaves(want), strict=True))
    pairs += [(torch.stack([m.loss for m in log]), torch.tensor(losses, dtype=torch.float64))]
    pairs += [(torch.stack([m.grad_norm for m in log if m.ok]), torch.tensor(norms, dtype=torch.float64))]
    return max((a - b).nan_to_num(0).abs().max().item() for a, b in pairs if a.numel())


def runs(table, axes, k, names=None, **form):
    """Every chain of a table, or those of some names: its distance, which updates were applied, and its bits."""
    micros = k * world_size()
    truth, out = zoo.reference(micros=micros, skip=(zoo.BAD,)), {}
    for name, (parts, stream) in table(zoo.source(tuple(axes), **form), k, zoo.tx(scale=True)).items():
        if names is not None and name not in names:
            continue
        run = zoo.train(parts, axes, stream, dtype=torch.float64, policy="float64", micros=micros)
        out[name] = (
            distance(run, truth),
            [bool(m.ok) for m in run[1]],
            torch.isfinite(run[1][zoo.BAD].loss).item(),
            zoo.bits(run),
        )
    return out


def check(found, one_hash=True):
    assert {n: d for n, (d, *_) in found.items() if not d < 1e-12} == {}
    assert all(ok == [t != zoo.BAD for t in range(zoo.UPDATES)] and not finite for _, ok, finite, _ in found.values())
    assert len({h for *_, h in found.values()}) == 1 or not one_hash


def flat(form, k, names=None):
    return runs(zoo.flat_chains, {"data": world_size()}, k, names, **FORMS[form])


def nested(form, k, names=None):
    return runs(zoo.nested_chains, {"node": 2, "local": 2}, k, names, **FORMS[form])


@EACH
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("world", "k"),
    [
        (1, "one"),
        (2, "all"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, "all"), (2, "one"), (4, "one"), (4, "all"))),
    ],
)
def test_every_stage_is_the_reference(run_world, world, k, form, whole):
    """Without `whole`: two chains in every form, and each of the others in one."""
    count, names = 1 if k == "one" else zoo.MICROS // world, None
    if not whole:
        chains = zoo.flat_chains(zoo.source(), count, zoo.tx())
        ours = list(chains)[list(FORMS).index(form) :: len(FORMS)]
        names = {"0 grad acc ar", "3 [grad acc", *ours}
    check(zoo.everywhere(run_world, world, flat, form, count, names))


@EACH
def test_three_ranks_are_the_reference_too(run_world, whole):
    """A world that is no power of two keeps its values, and its bits at each chain."""
    names = None if whole else ["0 grad ar acc", "1 grad acc [", "2 grad [acc", "3 [grad acc", "3 stream"]
    check(zoo.everywhere(run_world, 3, flat, "keep", 2, names), one_hash=False)


@EACH
@pytest.mark.parametrize("form", ["keep", *(pytest.param(x, marks=pytest.mark.slow) for x in ("whole", "remat"))])
def test_every_nest_is_the_reference(run_world, form, whole):
    """That all have one hash is asked of worlds, too."""
    names = None if whole else ["HSDP-1", "ZeRO-2", "MiCS", "hpZ once"]
    check(zoo.everywhere(run_world, 4, nested, form, 2, names))

"""Whatever an optimizer is given is refused when it is built, in one sentence with optimizer, argument and value."""

from __future__ import annotations

import pytest
import torch

import funczero as fz

SAID = {
    "a class of many forwards": (lambda: fz.from_torch("LBFGS", 1e-3), "from_torch: torch.optim.LBFGS cannot work here: it runs the forward again inside its step; write fz.adamw"),
    "a class that is none": (lambda: fz.from_torch("RMSProp", 1e-3), "from_torch: torch.optim.RMSProp is not known here; write one of ASGD"),
    "a scale of Muon": (lambda: fz.muon(0.1, scale="rms"), "muon: scale='rms' is none of 'original', 'match_rms_adamw' and 'none'; write one of them"),
    "a vector flattened": (lambda: fz.muon(0.1, flatten=2), "muon: flatten=2 takes vectors or matrices apart; write 3 or more, or 0 for none"),
    "a correction of LAMB": (lambda: fz.lamb(0.1, corrected="bias"), "lamb: corrected='bias' is none of 'moments', 'rate' and 'none'; write one of them"),
    "bounds that cross": (lambda: fz.lamb(0.1, low=2.0, high=1.0), "lamb: high=1.0 is below 2; write a finite number of at least 2"),
    "a decay that grows": (lambda: fz.adafactor(0.1, beta2_decay=0.8), "adafactor: beta2_decay=0.8 is above 0; write a number of at most 0"),
    "dampening without momentum": (lambda: fz.sgd(0.1, dampening=0.5), "sgd: dampening=0.5 damps a momentum, and there is none; leave one of them out"),
    "needs that are none": (lambda: fz.lift((tuple, tuple), needs="rows"), "lift: needs='rows' does not say how much of a leaf moves a value; write needs='elementwise', 'leafwise'"),
    "an option of another class": (lambda: fz.from_torch("RMSprop", 1e-3, betas=(0, 1)), "from_torch: torch.optim.RMSprop takes no 'betas' here; write some of"),
    "rules for a class of torch": (lambda: fz.from_torch("RMSprop", [("", 1.0)]), "from_torch: lr is a list, but these classes keep one number for all leaves"),
    "decay where there is none": (lambda: fz.from_torch("Rprop", 1e-3, 0.1), "from_torch: torch.optim.Rprop takes no weight_decay; leave weight_decay=0.1 out"),
    "torch's own refusal, when built": (lambda: fz.from_torch("AdamW", 1e-3, betas=(0.9, 2.0)), r"from_torch\('AdamW'\): torch.optim.AdamW refuses its arguments \(Invalid beta"),
    "a word for a flag": (lambda: fz.from_torch("AdamW", 1e-3, amsgrad="no"), r"from_torch\('AdamW'\): amsgrad='no' is a string and neither True nor False"),
    "one beta of two": (lambda: fz.from_torch("AdamW", 1e-3, betas=0.9), r"from_torch\('AdamW'\): betas=0.9 is a float; write 2 numbers, as \(0.9, 0.999\)"),
    "betas by rule": (lambda: fz.adamw(1e-3, b1=[("", 0.9)]), r"adamw: b1=\[\('', 0.9\)\] is a list, but it is the same for all leaves here: write one number .* or one schedule; only lr and"),
    "a schedule of the second beta": (lambda: fz.adamw(1e-3, b2=lambda u: 0.9), "adamw: b2=.* but it is the same for all leaves here"),
    "a regex that is none": (lambda: fz.sgd([("(", 1.0)]), r"sgd: the rule '\(' of lr is no regex"),
    "no rates": (lambda: fz.sgd({}), "sgd: lr={} holds no rate; write a number, a schedule"),
    "a scheduler of torch": (
        lambda: fz.sgd(torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 2)), "and no rate; .* write fz.schedules.from_torch\\('StepLR', lr, ...\\)",
    ),
    "a word for a flag of ours": (lambda: fz.sgd(0.1, 0.9, nesterov="yes"), "sgd: nesterov='yes' is a string and neither True nor False"),
    "a pair that is none": (lambda: fz.lift(3), "lift: 3 is no pair of functions; write \\(init, update\\)"),
    "a promise that is none": (lambda: fz.lift((tuple, tuple), elementwise="yes"), "lift: elementwise='yes' is a string and neither True nor False"),
    "a torch optimizer as a pair": (lambda: fz.lift(torch.optim.NAdam), r"lift: a torch optimizer steps on tensors of its own.*write fz.from_torch\('NAdam', lr\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_an_optimizer_that_cannot_be_is_refused(name):
    make, words = SAID[name]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


NONSENSE = {
    "a string": "1e-3",
    "a bool": True,
    "negative": -1,
    "nan": float("nan"),
    "inf": float("inf"),
    "too large": 10**400,
    "None": None,
    "a tensor": torch.tensor(0.1),
}
ARGUMENTS = {
    "adamw": {"lr", "b1", "b2", "eps", "weight_decay"}, "adam": {"lr", "b1", "b2", "eps", "weight_decay"}, "lion": {"lr", "b1", "b2", "weight_decay"},
    "adagrad": {"lr", "eps", "weight_decay"}, "sgd": {"lr", "momentum", "weight_decay"}, "lamb": {"lr", "b1", "b2", "eps", "weight_decay", "low"},
    "lars": {"lr", "momentum", "weight_decay", "trust", "eps"}, "muon": {"lr", "momentum", "weight_decay", "eps"},
    "adafactor": {"lr", "weight_decay", "d"}, "soap": {"lr", "b1", "b2", "eps", "weight_decay"}, "shampoo": {"lr", "momentum", "weight_decay", "eps", "b2"},
}  # fmt: skip


@pytest.mark.parametrize("kind", NONSENSE)
@pytest.mark.parametrize("name", [*ARGUMENTS, "from_torch"])
def test_every_number_of_every_optimizer_is_refused_when_built(name, kind):
    """One sentence with optimizer, argument and value."""
    bad = NONSENSE[kind]
    for what in ARGUMENTS.get(name, {"lr", "weight_decay"}):
        if name == "from_torch" and bad is None:
            continue  # the class's default
        make = (lambda **kw: fz.from_torch("RMSprop", **kw)) if name == "from_torch" else getattr(fz, name)
        for value, where in [
            (bad, ""),
            *([([("", bad)], "the rule '' of"), ({"w": bad}, "at 'w'")] if what in ("lr", "weight_decay") else []),
        ]:
            if name == "from_torch" and what == "lr" and where:
                continue
            with pytest.raises((TypeError, ValueError)) as caught:
                make(**{"lr": 1e-3, what: value})
            said = str(caught.value)
            assert (
                said.startswith(name) and f"{what}=" in said and where in said and "write " in said and "\n" not in said
            )

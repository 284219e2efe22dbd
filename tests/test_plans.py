"""gradients/plans.py: blocks that a module names itself, as units; what it names wrongly is refused by name."""

from __future__ import annotations

import pytest
import torch
from hugging import MODELS
from modules import far, got
from torch import nn

import funczero as fz
from funczero.gradients.plans import planned
from funczero.testing import simulate


class Block(nn.Module):
    def __init__(self, shared=None):
        super().__init__()
        self.inner, self.gain = shared or nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x + torch.tanh(self.inner(x)) * self.gain


class Net(nn.Module):
    """Blocks in lists of a list, one of them used twice, two with one inner layer; a list of something else."""

    def __init__(self, **says):
        super().__init__()
        self.first, self.rest = Block(), nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        inner, twice = nn.Linear(3, 3), Block()
        self.stages = nn.ModuleList(
            [nn.ModuleList([Block(inner), Block(inner)]), nn.ModuleList([twice, Block(), twice])]
        )
        for name, value in says.items():
            setattr(self, name, value)

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.rest[1](self.rest[0](self.first(x)))


STARS = {"stages.*.*": "free_full_weight", "first": "keep_full_weight"}


@pytest.mark.parametrize(
    "says", [{"_no_split_modules": ["Block", "Absent"]}, {"_fsdp_plan": STARS}], ids=["class", "path"]
)
def test_lists_of_a_list(says):
    found = planned(Net(**says))
    assert found.units == ("stages.0", "stages.1")
    assert "'stages.0' (2 Block), 'stages.1' (2 Block)" in found.words and next(iter(says)) in found.words
    assert "what ['stages.0.0', 'stages.0.1'] share is gathered with the rest" in found.words
    assert ("['Absent'] name nothing" in found.words) == ("_no_split_modules" in says)


def loss(model, x):
    return (model(x) ** 2).sum(), torch.tensor(float(len(x)))


def values():
    torch.manual_seed(0)
    net, x = Net(_no_split_modules=["Block"]).double(), torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    loss_fn, params = fz.stateless(net, loss, units="auto")
    return loss_fn.units, far(net, loss, x, got(loss_fn, params, x, 3))


def test_values_are_the_plain_ones():
    for units, off in simulate({"data": 2})(values):
        assert units == ("stages.0", "stages.1") and off < 1e-12


class Wrong(Net):
    _fsdp_plan = {"stages.*.*": "free_full_weight", "layers.*": "free_full_weight"}


REFUSED = {
    "nothing": (Net(), "asks Net for its blocks, but it has neither _fsdp_plan nor _no_split_modules; write"),
    "no path": (Net(_fsdp_plan={"layers.*": ""}), r"_fsdp_plan \['layers.\*'\] and _no_split_modules \[\] name none"),
    "no class": (Net(_no_split_modules=["Layer"]), r"_no_split_modules \['Layer'\] name none in a list"),
    "own path": (Wrong(), r"_fsdp_plan of Wrong states 'layers.\*', which names no module; correct it"),
    "a list": (Net(_fsdp_plan={"stages.*": ""}), "names 'stages.0', a ModuleList that holds blocks and runs none"),
    "some": (Net(_fsdp_plan={"stages.0.0": ""}), "names some blocks of 'stages.0', but not 'stages.0.1', a Block"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    module, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        fz.stateless(module, loss, units="auto")


SAID = {
    "llama": (("model.layers",), "3 LlamaDecoderLayer), as _fsdp_plan"),
    "gpt2": (("transformer.h",), "3 GPT2Block), as _no_split_modules"),
    "bart": (("model.encoder.layers", "model.decoder.layers"), "['model.layers.*'] name nothing"),
    "jamba": (("model.layers",), "2 JambaMambaDecoderLayer, 2 JambaAttentionDecoderLayer"),
    "swin": (("swin.encoder.layers",), "2 SwinStage"),
}


@pytest.mark.parametrize("name", SAID)
def test_models_of_hugging_face(name, caplog):
    pytest.importorskip("transformers")
    units, words = SAID[name]
    loss_fn, _ = fz.stateless(MODELS[name].make(), loss, units="auto")
    assert loss_fn.units == units and words in caplog.text

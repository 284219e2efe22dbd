"""Which blocks of a module are units: of the lists that repeat, those that hold least at a time."""

from __future__ import annotations

import pytest
from modules import Block as Residual
from modules import Net, loss
from torch import nn

from funczero.gradients.stateless import stateless
from funczero.gradients.units import find_units, neighbours


class Block(nn.Module):
    """Some weights of one's own."""

    def __init__(self, n=4):
        super().__init__()
        self.lin = nn.Linear(n, n)


class Other(Block):
    """A block of another type."""


class Holds(nn.Module):
    """A module that has some children by name."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Deep(Holds):
    """One of another type."""


class Runs(nn.ModuleList):
    """A list with a forward."""

    def forward(self, x):
        return x


def several(n, make=Block, *args):
    return nn.ModuleList(make(*args) for _ in range(n))


FOUND = {
    "a list of blocks": (lambda: Holds(blocks=several(3)), ("blocks",)),
    "a dict of blocks": (lambda: Holds(blocks=nn.ModuleDict({"a": Block(), "b": Block()})), ("blocks",)),
    "a sequence of blocks": (lambda: Holds(blocks=nn.Sequential(Block(), Block())), ("blocks",)),
    "one block is no list": (lambda: Holds(blocks=several(1)), ()),
    "no list": (lambda: Block(), ()),
    "bare layers are read as often as called": (lambda: Holds(heads=several(3, nn.Linear, 2, 2)), ()),
    "blocks without weights": (lambda: Holds(acts=several(3, nn.ReLU)), ()),
    "a list that is not all blocks": (lambda: Holds(blocks=nn.ModuleList([Block(), nn.ReLU(), Block()])), ()),
    "two lists": (lambda: Holds(encoder=several(2), decoder=several(3)), ("encoder", "decoder")),
    "blocks of two types": (lambda: Holds(blocks=nn.ModuleList([Block(), Other(), Block()])), ("blocks",)),
    "the root is a list": (lambda: several(3), ()),  # it has no path
    "stages hold more than their blocks": (
        lambda: Holds(stages=several(2, lambda: Holds(layers=several(4)))),
        ("stages.0.layers", "stages.1.layers"),
    ),
    "experts leave much of their layers at rest": (
        lambda: Holds(layers=several(4, lambda: Holds(experts=several(2), up=nn.Linear(40, 40)))),
        ("layers",),
    ),
    "experts are gathered with their layer, which runs them or not": (
        lambda: Holds(layers=several(2, lambda: Holds(experts=several(2), up=nn.Linear(40, 40)))),
        ("layers",),
    ),
    "so are those of a layer that holds nothing else": (
        lambda: Holds(layers=several(2, lambda: Holds(experts=several(2)))),
        ("layers",),
    ),
    "and of layers of which some have none": (
        lambda: Holds(layers=nn.ModuleList([Holds(mlp=Block()), Holds(mlp=Holds(parts=several(3)))])),
        ("layers",),
    ),
    "stages that shrink": (
        lambda: Holds(
            stages=nn.ModuleList(Holds(layers=several(3, Block, n), down=nn.Linear(n, 2 * n)) for n in (2, 4))
        ),
        ("stages.0.layers", "stages.1.layers"),
    ),
    "stages of several types, as a U-Net's": (
        lambda: Holds(down=nn.ModuleList([Holds(res=several(2)), Deep(res=several(2), cross=several(2, Other))])),
        ("down.0.res", "down.1.res", "down.1.cross"),
    ),
    "a list of lists": (
        lambda: Holds(blocks=several(2, lambda: several(3))),
        ("blocks.0", "blocks.1"),
    ),
    "a list of lists of one block each, which nobody calls": (
        lambda: Holds(blocks=nn.ModuleList([several(1), several(1)]), head=several(2)),
        ("blocks.0", "blocks.1", "head"),
    ),
    "blocks of lists of several types, as T5's": (
        lambda: Holds(
            blocks=nn.ModuleList(Deep(layer=nn.ModuleList([Block(), Other()]), n=nn.Linear(i, 4)) for i in (1, 2))
        ),
        ("blocks",),
    ),
    "a U-Net's lists of what runs together, with layers": (
        lambda: Holds(downs=several(2, lambda: nn.ModuleList([Block(), Block(), nn.Linear(4, 4), nn.Identity()]))),
        ("downs.0", "downs.1"),
    ),
    "lists of layers alone are read as often as called": (
        lambda: Holds(heads=several(2, lambda: several(2, nn.Linear, 2, 2))),
        (),
    ),
    "a list that runs is a block": (lambda: Holds(stages=several(2, Runs, [Block(), nn.Linear(4, 4)])), ("stages",)),
    "layers of several types, of which some have experts, as Jamba's": (
        lambda: Holds(layers=nn.ModuleList([Block(), Deep(experts=several(3), up=nn.Linear(4, 4)), Block(), Other()])),
        ("layers",),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_lists_are_found(name):
    make, want = FOUND[name]
    assert find_units(make(), None) == want


def test_lists_that_are_named_are_taken_as_they_are():
    deep = Holds(stages=several(2, lambda: Holds(layers=several(4))), heads=several(2, nn.Linear, 2, 2))
    for units in (("stages",), ["stages.0.layers"], "heads", ("stages", "heads")):
        assert find_units(deep, units) == ((units,) if isinstance(units, str) else tuple(units))
    assert find_units(deep, ()) == () and find_units(deep, None) == ("stages.0.layers", "stages.1.layers")


@pytest.mark.parametrize("bad", ["layers", "stages.7", "root", "stages.0.layers.0.lin"])
def test_a_name_that_is_no_list_of_blocks_is_refused_with_those_there_are(bad):
    deep = Holds(stages=several(2, lambda: Holds(layers=several(2))))
    with pytest.raises(ValueError) as e:
        find_units(deep, [bad])
    assert (
        str(e.value)
        == f"stateless: units={bad!r} names no list of blocks in Holds; its repeated lists are"
        " ['stages', 'stages.0.layers', 'stages.1.layers']"
    )


def test_neighbours_are_of_one_list():
    paths = ["a.0", "a.1", "a.2", "b.c.0", "b.c.1", "d.0"]
    assert [neighbours(paths, i) for i in range(6)] == [
        (None, 1), (0, 2), (1, None), (None, 4), (3, None), (None, None),
    ]  # fmt: skip
    for i in range(6):
        before, after = neighbours(paths, i)
        assert before is None or neighbours(paths, before)[1] == i
        assert after is None or neighbours(paths, after)[0] == i


# --- of a module that is made a loss ----------------------------------------------------------------------------------
def test_units_are_found():
    def stage(n):
        return nn.Sequential(*(Residual() for _ in range(n)))

    class Stage(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.layers = stage(n)

    deep = nn.ModuleDict(
        {"stages": nn.ModuleList([Stage(2), Stage(6)]), "heads": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}
    )
    assert stateless(Net(), loss)[0].units == ("blocks",)
    assert stateless(deep, loss)[0].units == ("stages.0.layers", "stages.1.layers")
    assert stateless(deep, loss, units=["heads"])[0].units == ("heads",)
    assert stateless(Net(), loss, units=())[0].units == () == stateless(nn.Linear(2, 2), loss)[0].units

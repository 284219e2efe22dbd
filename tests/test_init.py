"""Initial values: a function of the key and the path alone, the same on any mesh, and drawn part by part."""

from __future__ import annotations

import weakref

import pytest
import torch
import zoo
from torch import nn

import funczero as fz
from funczero import P, rng, tree
from funczero.core.types import Tree
from funczero.layout.init import init, leaf
from funczero.layout.lazy import Fill
from funczero.testing import simulate, tree_hash


def form(rows=5) -> Tree:
    """Leaves of several shapes and dtypes, one of them at two paths."""
    shared = leaf((rows, 3), rng.normal)
    return {
        "embed": shared,
        "blocks": [{"w": leaf((3, 4), rng.normal), "b": leaf((4,))} for _ in range(2)],
        "gain": leaf((), 1.5, torch.float64),
        "narrow": leaf((7,), rng.normal, torch.bfloat16),
        "none": leaf((0, 3), rng.normal),
        "head": shared,
    }


def whole(lazy_tree):
    """All leaves drawn, a tied one once."""
    once = {}
    return tree.map(lambda x: once.setdefault(id(x), x.make()), lazy_tree)


def values(lazy_tree):
    return {path: x.make() for path, x in tree.paths(lazy_tree)}


# --- leaf by leaf -----------------------------------------------------------------------------------------------------
def test_a_value_depends_on_the_key_and_its_path_alone():
    """Neither on what else there is, nor on the order in which leaves are drawn, nor on torch's generator."""
    want = values(init(form(), key=3))
    small = init({"blocks": [{"w": leaf((3, 4), rng.normal)}]}, key=3)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        before = torch.get_rng_state()
        again = {path: x.make() for path, x in reversed(tree.paths(init(form, key=3)))}
        assert torch.equal(torch.get_rng_state(), before)
    assert tree_hash([again[p] for p in want]) == tree_hash(list(want.values()))
    assert torch.equal(small["blocks"][0]["w"].make(), want["blocks/0/w"])
    drawn = ("embed", "blocks/0/w", "blocks/1/w", "narrow")
    other = values(init(form(), key=4))
    assert not any(torch.equal(other[p], want[p]) for p in drawn)
    assert not torch.equal(want["blocks/0/w"], want["blocks/1/w"])


def test_shapes_dtypes_numbers_and_ties_are_those_that_were_written():
    made, found = init(form(), key=1), values(init(form(), key=1))
    assert {p: (tuple(x.shape), x.dtype) for p, x in found.items()} == {
        p: (x.shape, x.dtype) for p, x in tree.paths(made)
    }
    assert found["gain"] == 1.5 and found["gain"].dtype == torch.float64 and not found["blocks/0/b"].any()
    assert found["narrow"].dtype == torch.bfloat16 and found["none"].numel() == 0
    assert made["embed"] is made["head"] and made["embed"] is not made["narrow"]


def parted(sizes, chain):
    """One hash of what every rank holds, as whole leaves, and whether it lies as a whole tree that was given would."""
    grad = lambda p, b: (sum(x.sum() for x in tree.leaves(p)) * b.sum(), torch.ones(()))
    parts = {
        "whole": (fz.value_and_grad(grad, batch=P(tuple(sizes))), *map(fz.all_reduce, reversed(sizes)), fz.sgd(1.0)),
        "cut": (fz.shard(list(sizes)[-1], fz.value_and_grad(grad, batch=P(tuple(sizes))), *(
            map(fz.all_reduce, list(sizes)[:-1])
        ), fz.sgd(1.0)),),
    }[chain]  # fmt: skip
    step = fz.train_step(*parts, mesh=sizes, policy="float64")
    lazily = step.init(fz.init(form(), key=5))
    given = step.init(whole(init(form(), key=5)))
    return tree_hash(step.params(lazily)), tree_hash(lazily.params) == tree_hash(given.params)


@pytest.mark.parametrize("chain", ["whole", "cut"])
@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2}, {"data": 3}, {"node": 2, "local": 2}], ids=str)
def test_values_are_the_same_on_any_mesh(sizes, chain):
    want = tree_hash(tree.map(lambda x: x.make().double(), init(form(), key=5)))
    assert simulate(sizes)(parted, sizes, chain) == [(want, True)] * torch.Size(sizes.values()).numel()


def test_no_two_leaves_are_whole_at_once():
    """A step draws them one after another, and keeps nothing but its own rows."""
    alive, most = [], []

    def counted(key, shape):
        x = rng.normal(key, shape)
        alive[:] = [r for r in alive if r() is not None]
        alive.append(weakref.ref(x))
        most.append(len(alive))
        return x

    step = fz.train_step(*fz.zero(zoo.source(units=()), *zoo.tx(), stage=3), mesh={"data": 1})
    step.init(fz.init({f"p{i}": leaf((64, 8), counted) for i in range(5)}))
    assert len(most) >= 5 and max(most) <= 2  # the one before may die as the next one is made


# --- modules ----------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Two layers of one type, a bare parameter, a tie, and one layer with two parameters of its own."""

    def __init__(self, device=None):
        super().__init__()
        self.embed = nn.Embedding(6, 4, device=device)
        self.layers = nn.ModuleList([nn.Linear(4, 4, device=device) for _ in range(2)])
        self.norm = nn.LayerNorm(4, device=device)
        self.head = nn.Linear(4, 6, bias=False, device=device)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def test_a_modules_parameters_are_drawn_on_meta_as_anywhere_and_it_stays_as_it_was():
    here, there = Net(), Net("meta")
    before = tree_hash(dict(here.named_parameters()))
    state = torch.get_rng_state()
    found, on_meta = ({n: x.make() for n, x in init(net, key=2).items()} for net in (here, there))
    assert torch.equal(torch.get_rng_state(), state) and tree_hash(dict(here.named_parameters())) == before
    assert all(p.is_meta for p in there.parameters())
    assert tree_hash(found) == tree_hash(on_meta)
    names = [n for n, _ in here.named_parameters(remove_duplicate=False)]
    assert sorted(found) == sorted(names) and all(found[n].shape == here.get_parameter(n).shape for n in names)


def test_a_submodule_is_drawn_as_torch_draws_it_from_its_own_key():
    """All parameters of one come out of one draw of its reset_parameters(), as one module of torch has them."""
    found = {n: x.make() for n, x in init(Net("meta"), key=2).items()}
    for i in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(rng.fold(2, f"layers.{i}"))
            want = nn.Linear(4, 4)
        assert torch.equal(found[f"layers.{i}.weight"], want.weight) and torch.equal(
            found[f"layers.{i}.bias"], want.bias
        )
    assert torch.equal(found["norm.weight"], torch.ones(4)) and torch.equal(found["norm.bias"], torch.zeros(4))


def test_a_tied_parameter_is_one_leaf():
    made = init(Net("meta"))
    assert made["head.weight"] is made["embed.weight"]


def test_a_layer_at_two_paths_has_its_names_at_both():
    """The names are those of fz.stateless, and the values those of the first path."""
    layer = nn.Linear(2, 2)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    found = init(net, key=2)
    assert found.keys() == fz.stateless(net, lambda net, b: (net(b).sum(), torch.ones(())))[1].keys()
    assert found["0.weight"] is found["2.weight"] and found["0.bias"] is not found["0.weight"]
    alone = init(nn.Sequential(nn.Linear(2, 2)), key=2)
    assert torch.equal(found["2.weight"].make(), alone["0.weight"].make())


def test_init_fn_sets_one_submodules_own_parameters():
    """As Hugging Face's _init_weights does: by type, in place, with draws."""

    def weights(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.constant_(module.bias, 7.0)

    found = {n: x.make() for n, x in init(Net("meta"), key=1, init_fn=weights).items()}
    assert (found["layers.0.bias"] == 7).all() and 0 < found["layers.1.weight"].std() < 0.1
    assert not torch.equal(found["layers.0.weight"], found["layers.1.weight"])


def started(sizes):
    """A module's first masters at every stage, by hash."""
    loss, _ = fz.stateless(Net(), lambda net, b: (net(b).square().sum(), torch.ones(())))
    grad, out = fz.value_and_grad(loss, batch=P("data"), units=loss.units), set()
    for stage in range(4):
        step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=stage), mesh=sizes)
        out.add(tree_hash(step.params(step.init(fz.init(Net("meta"), key=8)))))
    return out


def test_a_module_starts_from_the_same_values_at_every_stage_on_any_mesh():
    want = tree_hash({n: x.make() for n, x in init(Net(), key=8).items()})
    for size in (1, 3):
        assert simulate({"data": size})(started, {"data": size}) == [{want}] * size


# --- what cannot be drawn ---------------------------------------------------------------------------------------------
class Bare(nn.Module):
    """A submodule with parameters and no way to draw them."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.zeros(2))


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(TypeError, match=r"init: 'a/0' is a Tensor; write fz.leaf\(shape, draw\) for every parameter"):
        init({"a": [torch.zeros(2)]})
    with pytest.raises(TypeError, match=r"init: submodule 'inner' \(Module\) has parameters but no reset_parameters"):
        init(Bare())
    found = init(Bare(), init_fn=lambda m: m.w.fill_(3.0) if hasattr(m, "w") else None)
    assert found["inner.w"].make().tolist() == [3.0, 3.0]
    wrong = init({"w": leaf((2, 3), lambda key, shape: torch.zeros(3, 2))})
    with pytest.raises(ValueError, match=r"a leaf of shape \(2, 3\) was drawn with shape \(3, 2\)"):
        wrong["w"].make()


def test_one_leaf_alone_is_a_tree():
    assert isinstance(init(leaf((2,), 4.0)), Fill) and init(leaf((2,), 4.0)).make().tolist() == [4.0, 4.0]

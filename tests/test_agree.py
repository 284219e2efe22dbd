"""Units that not every rank runs, at stage 3: the values of stages 0 and 1, bit for bit, and of plain torch."""

from __future__ import annotations

import pytest
import torch
from cover import EACH
from modules import far, got
from torch import nn

import funczero as fz
from funczero import P
from funczero.core.types import ChainError
from funczero.gradients.ref import Ref
from funczero.testing import simulate, tree_hash

TWO = {"data": 2}
DIM = 6
LARGE = 184  # a unit of it leaves in a message of its own


class Expert(nn.Module):
    """A block."""

    def __init__(self, dim=DIM):
        super().__init__()
        self.up = nn.Linear(dim, dim)

    def forward(self, x):
        return torch.tanh(self.up(x))


class Net(nn.Module):
    """Some blocks in a list of any name, and how a forward goes through them."""

    def __init__(self, name, way, dim=DIM, n=4):
        super().__init__()
        self.inp = nn.Linear(DIM, dim)
        setattr(self, name, nn.ModuleList(Expert(dim) for _ in range(n)))
        self.name, self.way = name, way

    def forward(self, x):
        return self.way(getattr(self, self.name), self.inp(x))


def routed(blocks, x):
    """Every row goes to one of the blocks; a block without rows does not run."""
    to = (x.sum(-1) * 7).long() % len(blocks)
    out = torch.zeros_like(x)
    for i, block in enumerate(blocks):
        rows = (to == i).nonzero()[:, 0]
        if len(rows):
            out = out.index_add(0, rows, block(x[rows]))
    return x + out


def dropped(blocks, x):
    """Layers are left out by what the rows are."""
    for i, block in enumerate(blocks):
        if (x.sum() * 10).long() % 3 != i % 3:
            x = x + block(x)
    return x


def early(blocks, x):
    """It leaves at some block."""
    for block in blocks:
        x = x + block(x)
        if (x.sum() * 10).long() % 3 == 0:
            break
    return x


def looped(blocks, x):
    """Other numbers of passes, in turns backwards."""
    for t in range(1 + int(x.abs().sum() * 10) % 3):
        for block in list(blocks)[:: 1 - 2 * (t % 2)]:
            x = x + block(x)
    return x


def inner(blocks, x):
    """A gradient by the inputs on the way, on some rows."""
    if (x.sum() * 10).long() % 2:
        y = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(blocks[1](blocks[2](y)).sum(), y)
        x = x + 0.1 * g
    return blocks[0](x)


def nothing(blocks, x):
    """A rank whose sum is negative runs none."""
    return dropped(blocks, x) if x.sum() > 0 else x * 2.0


WAYS = {f.__name__: f for f in (routed, dropped, early, looped, inner, nothing)}


def rows(seed, n=2):
    return torch.randn(n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(model, x):
    return model(x).square().sum(), torch.tensor(float(len(x)))


def build(*args, **kw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Net(*args, **kw).double()


def trained(way, stage, dim=DIM, updates=3, kw=None, name="experts"):
    """The hashes of parameters after some updates of single rows, and the most units that were open."""
    net, tapes = build(name, WAYS[way], dim), []
    loss_fn, params = fz.stateless(net, loss, **kw or {})

    def seen(params, x):
        tapes.extend({p.tape for p in params.values() if isinstance(p, Ref)})
        return loss_fn(params, x)

    grad = fz.value_and_grad(seen, batch=P("data"), units=loss_fn.units, conditional=loss_fn.conditional)
    step = fz.train_step(*fz.zero(grad, fz.adamw(1e-2), stage=stage), mesh={"data": -1}, policy="float64")
    state, hashes = step.init(params), []
    for t in range(updates):
        state, m = step(state, step.local_rows(rows(t)))
        hashes.append(tree_hash((step.params(state), m.loss)))
    return hashes, max((t.gathers.peak for t in tapes if t.gathers is not None), default=0)


@EACH
@pytest.mark.parametrize(
    ("way", "dim"),
    [
        pytest.param(way, dim, marks=() if i % 2 == j else pytest.mark.slow, id=f"{way}-{'large' if j else 'small'}")
        for i, way in enumerate(WAYS)
        for j, dim in enumerate((DIM, LARGE))
    ],
)
def test_a_rank_may_leave_units_out_at_every_stage(way, dim, whole):
    found = {}
    for stage in (0, 2, 3) if whole else ((0, 3), (2, 3))[list(WAYS).index(way) // 2 % 2]:
        for hashes, peak in simulate(TWO)(trained, way, stage, dim):
            assert found.setdefault("hashes", hashes) == hashes, (way, stage)
            assert peak <= 2


@pytest.mark.parametrize("way", WAYS)
def test_without_it_every_way_is_told(way):
    with pytest.raises(RuntimeError):  # by torch, where threads are the ranks; processes are told by name
        simulate(TWO)(trained, way, 3, DIM, 3, {"conditional": ()})


@pytest.mark.parametrize("way", ["routed", "early", "looped"])
def test_so_it_is_with_blocks_that_run_again(way):
    found = [simulate(TWO)(trained, way, stage, DIM, 2, {"remat": True})[0][0] for stage in (1, 3)]
    assert found[0] == found[1]


def nested(way):
    net = build("experts", WAYS[way])
    loss_fn, params = fz.stateless(net, loss)
    out = []
    for parts in (fz.zero, fz.hpz):
        kw = {"stage": 3, "axis": ("node", "local")} if parts is fz.zero else {}
        grad = fz.value_and_grad(loss_fn, batch=P(("node", "local")))
        step = fz.train_step(*parts(grad, fz.adamw(1e-2), **kw), mesh={"node": 2, "local": 2}, policy="float64")
        state = step.init(params)
        for t in range(2):
            state, _ = step(state, step.local_rows(rows(t, 4)))
        out.append(tree_hash(step.params(state)))
    return out


@pytest.mark.parametrize("way", ["routed", "dropped"])
def test_so_it_is_over_two_axes(way):
    sizes = {"node": 2, "local": 2}
    assert len({h for hashes in simulate(sizes)(nested, way) for h in hashes}) == 1


def values(way):
    """How far the gradient of ranks with rows of their own is from the plain module's, micro-batch by micro-batch."""
    net = build("experts", WAYS[way])
    loss_fn, params = fz.stateless(net, lambda model, b: loss(model, b["x"]))

    def apart(_, b):
        each = [loss(net, x[None]) for x in b["x"]]
        return sum(total for total, _ in each), sum(weight for _, weight in each)

    return far(net, apart, {"x": rows(5)}, got(loss_fn, params, {"x": rows(5)}, 3))


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_plain_torchs(way):
    assert max(simulate(TWO)(values, way)) < 1e-12


def evaluated():
    net = build("experts", routed)
    loss_fn, params = fz.stateless(net, loss)
    step = fz.train_step(*fz.zero(fz.value_and_grad(loss_fn, batch=P("data")), fz.sgd(0.1), stage=3), policy="float64")
    found = step.eval(loss_fn)(step.init(params), step.local_rows(rows(3))).loss
    return abs(found.item() - sum(loss(net, x[None])[0] for x in rows(3)).item() / 2)


def test_a_look_goes_the_same_way():
    assert max(simulate(TWO)(evaluated)) < 1e-12


def functional(stage):
    """The loss of parameters by fz.layers and fz.gather, one expert a rank."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=g)
    params, batch = {"experts": [{"w": draw(8, 8)} for _ in range(3)]}, {"x": draw(8, 8), "e": torch.arange(8) // 4}

    def loss_fn(p, b):
        e = int(b["e"][0])
        h = fz.layers(lambda q, x: torch.tanh(x @ q["w"]), [p["experts"][e]], b["x"])
        if e:
            h = h @ fz.gather(p["experts"][2])["w"]
        return h.square().sum(), torch.tensor(float(len(h)))

    grad = fz.value_and_grad(loss_fn, batch=P("data"), units=("experts",))
    step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=stage), policy="float64")
    state = step.init(params)
    for _ in range(3):
        state, m = step(state, step.local_rows(batch))
    return tree_hash((step.params(state), m.loss))


def test_functions_of_parameters_may_branch_as_well():
    assert len({h for stage in (0, 1, 2, 3) for h in simulate(TWO)(functional, stage)}) == 1


class Modalities(nn.Module):
    """A tower that only rows with an image run; what all of them run is frozen."""

    def __init__(self):
        super().__init__()
        self.tower, self.text = nn.ModuleList(Expert() for _ in range(2)), nn.Linear(DIM, DIM).requires_grad_(False)

    def forward(self, b):
        x = self.text(b["x"])
        if b["image"].any():
            for block in self.tower:
                x = x + b["image"][:, None] * block(x)
        return x


def modal(stage, b):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Modalities().double()
    loss_fn, params = fz.stateless(
        net, lambda m, b: (m(b).square().sum(), torch.tensor(float(len(b["x"])))), conditional="tower"
    )
    grad = fz.value_and_grad(loss_fn, batch=P("data"), trainable=loss_fn.trainable)
    step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=stage), mesh={"data": -1}, policy="float64")
    state = step.init(params)
    for _ in range(2):
        state, m = step(state, step.local_rows(b))
    return tree_hash((step.params(state), m.loss))


@pytest.mark.parametrize("images", [(1, 0), (0, 1), (0, 0)], ids=str)
def test_a_rank_whose_rows_train_nothing_sends_zeros(images):
    b = {"x": rows(7), "image": torch.tensor(images, dtype=torch.float64)}
    assert len({h for stage in (0, 1, 2, 3) for h in simulate(TWO)(modal, stage, b)}) == 1


# --- what is conditional ----------------------------------------------------------------------------------------------
def test_lists_called_experts_are_conditional_and_others_are_named():
    source = lambda **kw: fz.value_and_grad(lambda p, b: None, batch=P("data"), **kw)
    assert source(units=("a.experts", "blocks")).conditional == ("a.experts",)
    assert source(units=("blocks",), conditional="blocks").conditional == ("blocks",)
    assert source(units=("experts",), conditional=()).conditional == ()
    assert source(units=("experts.0.layers", "expert", "expertise", "a/local_experts")).conditional == (
        "experts.0.layers",
        "expert",
        "a/local_experts",
    )
    with pytest.raises(ChainError, match=r"conditional names 'x', which is not among the units \['blocks'\]"):
        source(units=("blocks",), conditional=("x",))
    with pytest.raises(ChainError, match="conditional=.* is written with higher_order"):
        source(units=("blocks",), conditional=("blocks",), higher_order=True)


def test_a_list_whose_layers_are_dropped_in_training_is_conditional():
    net = build("layers", dropped)
    assert fz.stateless(net, loss)[0].conditional == ()
    net.layerdrop = 0.1
    assert fz.stateless(net, loss)[0].conditional == ("layers",)
    assert fz.stateless(net, loss, conditional=())[0].conditional == ()
    assert fz.value_and_grad(fz.stateless(net, loss)[0], batch=P("data"), units=()).conditional == ()
    with pytest.raises(ChainError, match="stateless: conditional names 'head', which is not among the units"):
        fz.stateless(net, loss, conditional="head")
    assert fz.stateless(net.eval(), loss)[0].conditional == ()


def test_a_list_that_is_named_is_right():
    runs = (simulate(TWO)(trained, "dropped", stage, DIM, 3, {"conditional": "layers"}, "layers") for stage in (1, 3))
    assert len({tuple(hashes) for ranks in runs for hashes, _ in ranks}) == 1


def test_layers_that_hugging_face_drops_are_dropped_alike_at_every_stage():
    """wav2vec2: each micro-batch draws which of its layers run."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8, 8],
        conv_stride=[2, 2],
        conv_kernel=[3, 3],
        num_feat_extract_layers=2,
        layerdrop=0.5,
        mask_time_prob=0.0,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Wav2Vec2Model(config).double().train()
    loss_fn, params = fz.stateless(
        model, lambda m, b: (m(b).last_hidden_state.square().sum(), torch.tensor(float(len(b))))
    )
    assert loss_fn.conditional == ("encoder.layers",)
    x = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(stage, micros):
        grad = fz.value_and_grad(loss_fn, batch=P("data"), rng=True)
        step = fz.train_step(
            *fz.zero(grad, fz.sgd(1e-3), stage=stage, accumulate=micros), mesh={"data": -1}, policy="float64"
        )
        state = step.init(params, key=1)
        for _ in range(3):
            state, m = step(state, step.local_rows(x))
        return tree_hash((step.params(state), m.loss))

    assert len({h for w, stage in ((1, 0), (2, 0), (2, 3)) for h in simulate({"data": w})(run, stage, 2 // w)}) == 1

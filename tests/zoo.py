"""Odd parameters, a ragged loss, the chains of every stage, and a reference by hand: what the laws are tried on."""

from __future__ import annotations

from functools import partial, reduce

import torch
import torch.nn.functional as F

import funczero as fz
from funczero import P, rng
from funczero.comm import collectives
from funczero.core.order import Dealt
from funczero.core.types import Env, Seed
from funczero.layout.lazy import lazy
from funczero.layout.mesh import connect, plan_mesh
from funczero.testing import tree_hash
from funczero.transforms.chain import build

MICROS, ROWS, TIME, BAD, UPDATES = 8, 3, 6, 3, 5
FEW = 4  # micro-batches where nothing is asked of sums, on four ranks at most
LR, CLIP, B1, B2, EPS, DECAY = 1e-2, 0.15, 0.9, 0.99, 1e-8, 0.01
TX = dict(lr=LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)


def params(dtype=torch.float32):
    """Odd, empty, 0-d, tied, unused and repeated leaves."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(shape, generator=g) * 0.5).to(dtype)

    shared = draw(5)
    blocks = [{"w": draw(5, 7), "v": draw(7, 5), "b": draw(7)} for _ in range(3)]
    return {
        "embed": draw(11, 5),
        "norm": shared,
        "conv": draw(3, 4, 5),
        "empty": draw(0, 5),
        "unused": draw(4),
        "gain": draw(),
        "blocks": blocks,
        "head": {"w": draw(7, 5), "scale": shared, "b": draw(7)},
        "one": draw(1),
    }


def batch(t, dtype=torch.float32, micros=MICROS):
    """Ragged masks, an empty micro-batch, and at update BAD one value that overflows."""
    g = torch.Generator().manual_seed(100 + t)
    n = micros * ROWS
    b = {
        "x": torch.randint(11, (n, TIME), generator=g),
        "y": torch.randint(7, (n, TIME), generator=g),
        "mask": (torch.arange(TIME) < torch.randint(0, TIME + 1, (n, 1), generator=g)).to(dtype),
        "boost": torch.ones(n, dtype=dtype),
    }
    b["mask"][0, 0] = 1
    b["mask"][2 * ROWS : 3 * ROWS] = 0
    if t == BAD:
        row = (4 * ROWS + 1) % n
        b["boost"][row], b["mask"][row, 0] = float("inf"), 1
    return b


def block(p, x, shift, key=None):
    """A block with a shared input; dropout when it has a key."""
    h = torch.tanh(x @ p["w"] + p["b"]) @ p["v"]
    if key is not None:
        h = rng.dropout(h, 0.2, key)
    return x + h * shift


def forward(p, b, key=None, remat=False):
    """Sum of masked losses, sum of weights; block 1 is used twice."""
    wide = b["mask"].dtype
    h = F.embedding(b["x"], p["embed"]) * p["norm"]
    h = h + torch.einsum("bte,ije->bt", h, p["conv"])[..., None] * p["gain"]
    h = fz.layers(block, p["blocks"], h, p["one"], key=key, remat=remat)
    h = fz.layers(block, p["blocks"][1:2], h, p["one"], key=None if key is None else key + 1, remat=remat)
    logits = ((h * p["head"]["scale"]) @ p["head"]["w"].T + p["head"]["b"]).to(wide)
    nll = F.cross_entropy(logits.flatten(0, 1), b["y"].flatten(), reduction="none").view(b["y"].shape)
    return (nll * b["mask"] * b["boost"][:, None]).sum(), b["mask"].sum()


def loss_plain(p, b):
    """Without randomness."""
    return forward(p, b)


def loss_remat(p, b):
    """Without randomness, blocks run again."""
    return forward(p, b, remat=True)


def loss_random(p, b, key):
    """With dropout."""
    return forward(p, b, key)


def loss_random_remat(p, b, key):
    """With dropout, blocks run again."""
    return forward(p, b, key, remat=True)


def split(b, k):
    """Micro-batches."""
    return [{n: x.chunk(k)[i] for n, x in b.items()} for i in range(k)]


def reference(updates=UPDATES, micros=MICROS, loss_fn=loss_plain, skip=(), frozen=lambda path: False):
    """AdamW with a clip by global norm in float64, unsharded, by hand: masters by path, losses, norms."""
    tree = params(torch.float64)
    flat, where = torch.utils._pytree.tree_flatten(tree)
    still = {id(x) for path, x in fz.tree.paths(tree) if frozen(path)}
    unique = list({id(x): x for x in flat}.values())
    index = [next(j for j, u in enumerate(unique) if u is x) for x in flat]
    p = [x.clone() for x in unique]
    m, v, n, losses, norms = [torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p], 0, [], []
    for t in range(updates):
        q = [x.clone().requires_grad_() for x in p]
        whole = torch.utils._pytree.tree_unflatten([q[i] for i in index], where)
        loss, weight = loss_fn(whole, batch(t, torch.float64, micros))
        losses.append((loss / weight).item())
        if t in skip:
            continue
        g = [
            torch.zeros_like(x) if y is None else y
            for x, y in zip(q, torch.autograd.grad(loss / weight, q, allow_unused=True))
        ]
        g = [x * 0 if id(u) in still else x for x, u in zip(g, unique)]
        norm = sum((x * x).sum() for x in g).sqrt()
        norms.append(norm.item())
        n += 1
        for i, x in enumerate(g):
            if id(unique[i]) in still:
                continue
            x = x * min(1.0, CLIP / norm)
            m[i], v[i] = B1 * m[i] + (1 - B1) * x, B2 * v[i] + (1 - B2) * x * x
            p[i] = p[i] * (1 - LR * DECAY) - LR * (m[i] / (1 - B1**n)) / ((v[i] / (1 - B2**n)).sqrt() + EPS)
    return torch.utils._pytree.tree_unflatten([p[i] for i in index], where), losses, norms


def tx(scale=False):
    """What stands right of the mean."""
    scaling = (fz.scale_loss(init=2.0**10, weight=64, window=2, hysteresis=1),) if scale else ()
    return (*scaling, fz.clip_by_global_norm(CLIP), fz.adamw(**TX))


def flat_chains(g, k, right):
    """Every stage and nesting of accumulates on one axis: name -> (parts, micro-batches a stream call takes)."""
    acc, sh, ar = fz.accumulate, fz.shard, fz.all_reduce
    out = {
        "0 grad acc ar": ((g, acc(k), ar("data"), *right), 0),
        "0 grad ar acc": ((g, ar("data"), acc(k), *right), 0),
        "1 grad acc [": ((g, acc(k), sh("data", *right)), 0),
        "2 grad [acc": ((g, sh("data", acc(k), *right)), 0),
        "3 [grad acc": ((sh("data", g, acc(k), *right),), 0),
        "3 stream": ((sh("data", g, acc(k, stream=True), *right),), k),
    }
    if k > 1 and k % 2 == 0:
        out |= {
            "1 stream": ((g, acc(k, stream=True), sh("data", *right)), k),
            "2 acc(2) [stream": ((g, acc(2), sh("data", acc(k // 2, stream=True), *right)), k // 2),
            "2 acc(2) [acc": ((g, acc(2), sh("data", acc(k // 2), *right)), 0),
            "3 [acc(2) acc": ((sh("data", g, acc(2), acc(k // 2), *right),), 0),
            "0 acc(2) ar acc": ((g, acc(2), ar("data"), acc(k // 2), *right), 0),
        }
    return out


def nested_chains(g, k, right):
    """DDP to hpZ on two axes."""
    acc, sh, ar = fz.accumulate, fz.shard, fz.all_reduce
    return {
        "DDP": ((g, acc(k), ar("local"), ar("node"), *right), 0),
        "ZeRO-1": ((g, acc(k), sh("local", sh("node", *right))), 0),
        "HSDP-1": ((g, acc(k), ar("node"), sh("local", *right)), 0),
        "ZeRO-2": ((g, sh("local", sh("node", acc(k), *right))), 0),
        "MiCS": ((sh("local", g, acc(k), ar("node"), *right),), 0),
        "ZeRO-3": ((sh("local", sh("node", g, acc(k), *right)),), 0),
        "hpZ": ((sh("local", g, sh("node", acc(k), *right)),), 0),
        "hpZ once": ((sh("local", g, acc(k), sh("node", *right)),), 0),
        "hpZ outwards": ((sh("node", g, acc(k), sh("local", *right)),), 0),
    }


def train(
    parts,
    mesh,
    stream=0,
    updates=UPDATES,
    dtype=torch.float32,
    policy=None,
    donate=False,
    micros=MICROS,
    rows=None,
    **kw,
):
    """A run: (whole masters, metrics by update, the last state, the step).

    With `rows` of a micro-batch there may be fewer of them than places.
    """
    step = fz.train_step(*parts, mesh=mesh, policy=policy, **kw)
    step = fz.donate(step) if donate else step
    state, log = step.init(params(dtype), key=7), []
    for t in range(updates):
        mine = step.local_rows(batch(t, dtype, micros), rows)
        cut = mine.split if isinstance(mine, Dealt) else partial(split, mine)
        for b in [*cut(stream), None] if stream else [mine]:
            state, m = step(state, b)
        log.append(m)
    return step.params(state), log, state, step


def make(stage, *, units=("blocks",), k=1, mesh=None, policy=None, right=(), **kw):
    """A step of a stage."""
    parts = fz.zero(source(units=units), *(right or tx()), stage=stage, accumulate=k)
    return fz.train_step(*parts, mesh=mesh or {"data": -1}, policy=policy, **kw)


def source(world_axes=("data",), loss_fn=loss_plain, units=("blocks",), **kw):
    """The zoo's gradient."""
    return fz.value_and_grad(loss_fn, batch=P(tuple(world_axes)), units=units, **kw)


def whole(slots, mesh):
    """Any Slots of a state as the whole tree; a collective."""
    joined = reduce(lambda x, a: collectives.all_gather(x, a, mesh), reversed(slots.where.axes), slots)
    return joined.where.structure.unflatten([x if x is None else x.clone() for x in joined.leaves()])


def bits(run):
    """One hash of a run: masters, moments, counters, scale, and every metric of every update."""
    masters, log, state, step = run
    mesh, own = step.running().env.mesh, dict(state.chain)
    moments = [(x.count, whole(x.mu, mesh), whole(x.nu, mesh)) for x in [own.pop("adamw")]]
    return tree_hash(
        [
            masters,
            moments,
            {n: x for n, x in own.items() if n in ("scale_loss", "exact_sums")},
            state.step,
            state.updates,
            state.key,
            log,
        ]
    )


class Sums:
    """A chain without a step: `sums(batch)` is the Out of one apply, on this rank's rows as they are given."""

    def __init__(self, *parts, mesh, tree=None, policy="float64", frozen=lambda path: False):
        """Parameters rest where the chain says; float64 throughout."""
        flat = fz.chain(*parts)
        self.grad = build(flat, Env(connect(plan_mesh(mesh)), fz.Policy.parse(policy), {}))
        self.mesh = self.grad.env.mesh
        params_ = lazy(
            params(torch.float64) if tree is None else tree,
            flat[0].units,
            self.grad.env.rules,
            frozen,
            self.mesh.device,
        )
        at = lambda axes: params_.at(
            tuple((a, self.mesh.axes[a].size, self.mesh.index(a)) for a in axes), self.grad.env.policy.compute
        )
        self.views, self.state = at(self.grad.layout.rest), self.grad.init(params_)

    def __call__(self, batch):
        """The sum (or value) of one call."""
        out, _ = self.grad.apply(self.views, self.state, batch, Seed(torch.ones((), dtype=torch.float64), 0))
        return out


def everywhere(run_world, size, fn, *args):
    """What fn returns, the same in every rank of a world; in this process where the world is one."""
    first, *others = [fn(*args)] if size == 1 else run_world(size, fn, *args, timeout=300.0)
    assert all(x == first for x in others)
    return first

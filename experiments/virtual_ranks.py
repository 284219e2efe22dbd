"""Two nodes of two ranks in one process: `fz.zeropp` with ranks, and seeds, as a leading dim of every tensor.

Wires are pure functions, so what a rank reads of what another sends needs no sending. Each rank's gradient is rounded
as it leaves over "local", read, added, rounded again over "node", read, added; new parameters are rounded where they
cross nodes, and the next gradient is taken at what was read. `differs` compares all that with real ranks, bit for bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gpt
import torch
import torch.nn.functional as F
from torch import Tensor

import funczero as fz
from funczero import P
from funczero.comm.wire import Wire, as_born
from funczero.core.order import tree_sum
from funczero.testing import simulate

NODES, RANKS = 2, 2  # nodes, and ranks of each
MESH, BOTH = {"node": NODES, "local": RANKS}, ("node", "local")
SIZES = gpt.Sizes(2, 64, 4)
CACHE = 1 << 15  # values that one pass after another finds in the cache


class Run(NamedTuple):
    """How long and on what one trains."""

    updates: int
    rows: int  # windows of text of a rank in an update
    length: int  # bytes in a window
    lr: float  # the peak


# --- a model whose tensors may have a leading dim of runs -------------------------------------------------------------
def block(p: dict, x: Tensor, angles: Tensor) -> Tensor:
    """The GPT's block: x [..., batch * time, width] -> the same shape."""
    heads, time = p["qkv"].shape[-2], angles.shape[1]
    h = F.layer_norm(x, x.shape[-1:]) * p["norm1"].unsqueeze(-2)
    q, k, v = (h @ p["qkv"].flatten(-3)).view(-1, time, 3, heads, x.shape[-1] // heads).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(gpt.turn(q, angles), gpt.turn(k, angles), v, is_causal=True)
    x = x + h.transpose(1, 2).reshape(x.shape) @ p["out"]
    h = F.layer_norm(x, x.shape[-1:]) * p["norm2"].unsqueeze(-2)
    return x + F.gelu(h @ p["up"], approximate="tanh") @ p["down"]


def loss_fn(params: dict, batch: dict) -> tuple[Tensor, Tensor]:
    """(sum of -log p in nats, [...]; how many bytes); leaves are [...] + their shape, x and y [..., batch, time]."""
    *runs, words, width = params["embed"].shape
    rows, time = batch["x"].shape[-2:]
    first = torch.arange(params["embed"].numel() // (words * width)).view(-1, 1, 1) * words
    x = F.embedding(batch["x"].view(-1, rows, time) + first, params["embed"].reshape(-1, width))
    angles = gpt.rotary(time, width // SIZES.heads, x.device)
    x = fz.layers(block, params["blocks"], x.view(*runs, rows * time, width), angles)
    scores = F.layer_norm(x, x.shape[-1:]) * params["norm"].unsqueeze(-2) @ params["head"].transpose(-1, -2)
    nll = F.cross_entropy(scores.reshape(-1, words), batch["y"].flatten(), reduction="none")
    return nll.view(*runs, -1).sum(-1), nll.new_tensor(rows * time)


# --- what is read of what travels -------------------------------------------------------------------------------------
class Form(NamedTuple):
    """A wire, and what is read of [blocks, values of a block] that travelled over it."""

    wire: Wire
    read: Callable[[Tensor], Tensor] = lambda rows: rows
    block: int = 512


def integers(bits: int, block: int, hadamard: int = 0) -> Form:
    """Of 8 or 4 bits, in fewer passes than the wire packs and reads in; --check compares the two."""
    wire, qmax = {8: (fz.int8, 127), 4: (fz.int4, 7)}[bits]

    def read(rows: Tensor) -> Tensor:
        x = rotated(rows, hadamard) if hadamard else rows
        low, high = x.aminmax(dim=1, keepdim=True)
        tops = torch.maximum(-low, high)
        x = (x / torch.where(tops > 0, tops, 1)).mul_(qmax).round_().div_(qmax).mul_(tops)
        return rotated(x, hadamard).div_(hadamard) if hadamard else x

    return Form(wire(block, hadamard=hadamard), read, block)


def rotated(rows: Tensor, width: int) -> Tensor:
    """Every group of `width` values times the Hadamard matrix, added in the wire's order."""
    x, step = rows.reshape(-1, width).t().contiguous(), 1
    while step < width:
        low, high = x.view(-1, 2, step, x.shape[-1]).unbind(1)
        x, step = torch.stack([low + high, low - high], 1).view(width, -1), 2 * step
    return x.t().contiguous().view(rows.shape)


def through(form: Form, x: Tensor, sizes: list[int], parts: int) -> Tensor:
    """What is read of x[runs, n] when every leaf is sent in so many equal parts, each of whole blocks or less than one.

    Args:
      sizes: values of every leaf, falling; those of less than a block a part have one size.

    Raises:
      ValueError: they do not.
    """
    if form.wire is as_born:
        return x
    large, short = [n for n in sizes if n >= form.block * parts], [n for n in sizes if n < form.block * parts]
    if any(n % (form.block * parts) for n in large) or len(set(short)) > 1 or any(n % (16 * parts) for n in short):
        raise ValueError(f"leaves of {sizes} values in {parts} parts are no whole blocks of {form.block}")
    pieces = x[:, : sum(large)].reshape(-1, form.block).split(CACHE // form.block)
    whole = torch.cat([form.read(piece) for piece in pieces])
    rest = form.read(x[:, sum(large) :].reshape(-1, short[0] // parts if short else 1))
    return torch.cat([whole.view(len(x), sum(large)), rest.view(len(x), sum(short))], 1)


# --- virtual ranks ----------------------------------------------------------------------------------------------------
class Setting(NamedTuple):
    """What travels: parameters across nodes, gradients within a node and across."""

    weights: Form
    within: Form
    across: Form


def setting(weights: Form, within: Form, across: Form | None = None) -> Setting:
    """Gradients take the same wire both times where one is given."""
    return Setting(weights, within, within if across is None else across)


def feedback(form: Form, decay: float = 0.0) -> Form:
    """A form of gradients that remembers what it rounded away."""
    return form._replace(wire=fz.feedback(form.wire, decay))


def difference(form: Form) -> Form:
    """A form of parameters that sends what is new."""
    return form._replace(wire=fz.difference(form.wire))


exact, half = Form(as_born), Form(fz.cast("bfloat16"), lambda rows: rows.bfloat16().float())
w8, w4, g8, g4 = integers(8, 1024), integers(4, 1024), integers(8, 512), integers(4, 512)
SETTINGS = {
    "none": setting(exact, exact),
    "int8/int4": setting(w8, g4),
    "int8/int8": setting(w8, g8),
    "int4/int4": setting(w4, g4),
    "int8/int4 rotated": setting(w8, integers(4, 512, 16)),
    "int8/int8+int4 rotated": setting(w8, g8, integers(4, 128, 16)),
    "bf16/bf16": setting(half, half),
    "int8/int4 feedback": setting(w8, feedback(g4)),
    "int4 difference/int4": setting(difference(w4), g4),
    "int4 difference/int4 feedback": setting(difference(w4), feedback(g4)),
    "int4 difference/int8+int4 rotated": setting(difference(w4), g8, integers(4, 128, 16)),
    "int4 difference/int8+int4 rotated feedback": setting(difference(w4), g8, feedback(integers(4, 128, 16))),
    "int8/int4 LoCo": setting(w8, feedback(g4, decay=0.8)),
}


class Virtual(NamedTuple):
    """A world of NODES x RANKS for several seeds at once."""

    how: Setting
    run: Run
    seeds: tuple[int, ...]
    step: fz.Step  # one rank's, for gradients that have been summed
    spec: Any  # of the tree of parameters
    shapes: list[torch.Size]
    order: list[int]  # numbers of the leaves, by falling size


class State(NamedTuple):
    """Exact parameters and moments; what every rank reads, leaves [seeds, ...]; what wires remember, [senders, n]."""

    train: fz.TrainState
    views: list[Tensor]
    within: Tensor | float = 0.0
    across: Tensor | float = 0.0


def optimizer(run: Run) -> fz.GradientTransformation:
    """AdamW; the rate rises over 50 updates, and a half cosine takes it to a tenth."""
    lr = fz.schedules.warmup_cosine(run.lr, min(50, run.updates), run.updates, end=run.lr / 10)
    return fz.adamw(lr, b1=0.9, b2=0.95, weight_decay=[("norm", 0.0), ("", 0.1)])


def virtual(how: Setting, run: Run, seeds: tuple[int, ...]) -> tuple[Virtual, State]:
    """A world and its first state."""
    trees = [gpt.init(seed, SIZES) for seed in seeds]
    spec = fz.tree.flatten(trees[0])[1]
    leaves = [torch.stack(xs) for xs in zip(*(fz.tree.leaves(x) for x in trees), strict=True)]
    shapes = [x.shape[1:] for x in leaves]
    order = sorted(range(len(shapes)), key=lambda i: -shapes[i].numel())
    step = fz.donate(
        fz.train_step(fz.pullback(batch=P("data")), fz.all_reduce("data"), optimizer(run), mesh={"data": 1})
    )
    world = Virtual(how, run, seeds, step, spec, shapes, order)
    train = step.init(fz.tree.unflatten(leaves, spec))
    return world, State(train, read(world, train, leaves))


def flat(world: Virtual, leaves: list[Tensor]) -> Tensor:
    """[runs, ...] leaves as [runs, n]."""
    return torch.cat([leaves[i].flatten(1) for i in world.order], 1)


def apart(world: Virtual, x: Tensor) -> list[Tensor]:
    """[runs, n] as leaves [runs, ...]."""
    parts = dict(zip(world.order, x.split([world.shapes[i].numel() for i in world.order], 1), strict=True))
    return [parts[i].unflatten(1, shape) for i, shape in enumerate(world.shapes)]


def masters(train: fz.TrainState) -> list[Tensor]:
    """The parameters that are updated, and exported."""
    return [x for x in train.params.leaves() if x is not None]


def cross(world: Virtual, form: Form, x: Tensor, parts: int) -> Tensor:
    """What is read of x[runs, n] that travels in so many parts a leaf."""
    return through(form, x, [world.shapes[i].numel() for i in world.order], parts)


def read(world: Virtual, train: fz.TrainState, views: list[Tensor]) -> list[Tensor]:
    """What all ranks read of the parameters once they have crossed nodes; views: what they read last."""
    form, new = world.how.weights, flat(world, masters(train))
    if not form.wire.difference:
        return apart(world, cross(world, form, new, NODES * RANKS))
    old = flat(world, views)
    return apart(world, old + cross(world, form, new - old, NODES * RANKS))


def remembered(world: Virtual, form: Form, x: Tensor, old: Tensor | float, parts: int) -> tuple[Tensor, Tensor | float]:
    """What is read of x[senders, n] that travels, and what the senders remember of it."""
    if form.wire.memory is None:
        return cross(world, form, x, parts), old
    x = x + old
    sent = cross(world, form, x, parts)
    return sent, form.wire.memory.keep(x, sent, old)


def summed(world: Virtual, state: State, grads: Tensor) -> tuple[Tensor, State]:
    """[seeds * nodes * ranks, n] gradients as they are summed, within nodes and then across: [seeds, n]."""
    sent, within = remembered(world, world.how.within, grads, state.within, RANKS)
    nodes = tree_sum(list(sent.unflatten(0, (-1, RANKS)).unbind(1)))
    sent, across = remembered(world, world.how.across, nodes, state.across, NODES * RANKS)
    return tree_sum(list(sent.unflatten(0, (-1, NODES)).unbind(1))), state._replace(within=within, across=across)


def update(world: Virtual, state: State, batch: dict) -> tuple[State, Tensor]:
    """One update of all seeds; batch x and y are [seeds * nodes * ranks, rows, time]. Mean losses, float64 [seeds]."""
    leaves = [x.repeat_interleave(NODES * RANKS, 0).requires_grad_() for x in state.views]
    losses, weight = loss_fn(fz.tree.unflatten(leaves, world.spec), batch)
    grads = flat(world, list(torch.autograd.grad(losses.sum(), leaves)))
    total, state = summed(world, state, grads)
    losses, weight = losses.detach(), weight * NODES * RANKS
    pull = lambda cotangent: fz.tree.unflatten(apart(world, total), world.spec)
    train, metrics = world.step(state.train, (pull, losses.sum(), weight))
    mean = tree_sum(list(losses.double().view(len(world.seeds), -1).unbind(1))) * (1 / weight.double())
    if not (metrics.ok and mean.isfinite().all()):
        raise RuntimeError(f"update {int(metrics.updates)} of seeds {list(world.seeds)} is not finite; lower --lr")
    return state._replace(train=train, views=read(world, train, state.views)), mean


# --- against real ranks -----------------------------------------------------------------------------------------------
def batch_of(corpus: fz.data.Corpus, run: Run, seed: int, now: int) -> dict:
    """The global batch of an update."""
    return fz.data.batch(corpus, seed, now, run.rows * NODES * RANKS, run.length)


def stacked(corpus: fz.data.Corpus, world: Virtual, now: int) -> dict:
    """The global batches of all seeds as those of their ranks: [seeds * nodes * ranks, rows, time]."""
    run, batches = world.run, [batch_of(corpus, world.run, seed, now) for seed in world.seeds]
    return {k: torch.cat([b[k] for b in batches]).view(-1, run.rows, run.length) for k in ("x", "y")}


def real(how: Setting, run: Run, seed: int, updates: int, corpus: fz.data.Corpus) -> dict[str, list[Tensor]]:
    """One rank of the chain itself."""
    grad = fz.value_and_grad(loss_fn, batch=P(BOTH), units=("blocks",))
    gradients = how.within.wire, how.across.wire
    chain = fz.zeropp(grad, optimizer(run), weights=how.weights.wire, gradients=gradients)
    step = fz.train_step(*chain, mesh=MESH)
    state, losses = step.init(gpt.init(seed, SIZES)), []
    for now in range(updates):
        state, metrics = step(state, step.local_rows(batch_of(corpus, run, seed, now)))
        losses.append(metrics.loss)
    views = [x.clone() for x in step.whole_views(state).leaves() if x is not None]
    return {"losses": losses, "parameters": fz.tree.leaves(step.params(state)), "views": views}


def differs(how: Setting, run: Run, seeds: tuple[int, ...], updates: int, corpus: fz.data.Corpus) -> str | None:
    """Where virtual ranks first give other bits than real ones; None: nowhere."""
    world, state = virtual(how, run, seeds)
    losses = []
    for now in range(updates):
        state, mean = update(world, state, stacked(corpus, world, now))
        losses.append(mean)
    found = {"losses": losses, "parameters": masters(state.train), "views": state.views}
    for s, seed in enumerate(seeds):
        for rank, want in enumerate(simulate(MESH, timeout=3600)(real, how, run, seed, updates, corpus)):
            for what, theirs in want.items():
                for i, (a, b) in enumerate(zip(found[what], theirs, strict=True)):
                    if not torch.equal(a[s], b):
                        return f"{what}[{i}] of seed {seed} on rank {rank}"
    return None

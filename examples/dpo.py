"""A language model learns to prefer one kind of answer to another, kept near what it was (DPO).

Shows: a reference that a loss reads and nobody moves. `fz.frozen(state, step)` is the state that supervised training has
ended with, read where it lies: cut over the ranks, without a copy, a gradient or moments. The policy is another state,
which began with the same values.

Run:
    python examples/dpo.py
    torchrun --nproc-per-node=2 examples/dpo.py
Expect: the supervised model counts up as often as down, for so does its text; after the second part it counts up.
Found: FOUND

Source: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290.
"""

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz
from funczero import P

WORDS, LENGTH, BETA = 16, 8, 0.2


def counting(rows, seed, by=(1, -1)):
    """Texts that count from anywhere, up or down, modulo the number of words."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(WORDS, (rows, 1), generator=g)
    step = torch.tensor(by)[torch.randint(len(by), (rows, 1), generator=g)]
    return (start + step * torch.arange(LENGTH)) % WORDS


class Model(nn.Module):
    """Logits of the next word, of the last two."""

    def __init__(self, width=32, depth=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.join = nn.Linear(2 * width, width)
        layer = lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.blocks = nn.ModuleList(layer() for _ in range(depth))

    def forward(self, text):
        x = self.embed(text)
        x = self.join(torch.cat([x, F.pad(x, (0, 0, 1, 0))[:, :-1]], -1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def log_prob(model, text):
    """Of every row: the log probability of its words after the first."""
    return -F.cross_entropy(model(text[:, :-1]).mT, text[:, 1:], reduction="none").sum(1)


def main(updates=150, rows=32, stage=3, accumulate=1):
    """Trains twice; returns how often texts count up after each part, and the second one's losses."""
    torch.manual_seed(0)
    model, apart = Model(), lambda model, b: log_prob(model, b["up"]) - log_prob(model, b["down"])
    supervised, params = fz.stateless(model, lambda model, text: (-log_prob(model, text).sum(), text[:, 1:].numel()))
    margin, _ = fz.stateless(model, lambda model, b: (apart(model, b), 1))
    upward, _ = fz.stateless(model, lambda model, b: (apart(model, b).sigmoid().sum(), len(b["up"])))

    def preferred(params, batch):
        """-log sigmoid of how much more than its reference the policy prefers to count up."""
        with torch.no_grad():
            before, _ = margin(reference.params(), batch)
        now, _ = margin(params, batch)
        return -F.logsigmoid(BETA * (now - before)).sum(), len(now)

    def built(loss_fn, lr, mesh):
        grad = fz.value_and_grad(loss_fn, batch=P("data"), units=supervised.units)
        return fz.train_step(*fz.zero(grad, fz.adamw(lr), stage=stage, accumulate=accumulate), mesh=mesh)

    first = built(supervised, 1e-2, {"data": -1})
    second = built(preferred, 1e-3, first.mesh)
    pairs = lambda n: {"up": counting(rows, n, (1,)), "down": counting(rows, n, (-1,))}
    chance = lambda step, state: step.eval(upward)(state, step.local_rows(pairs(0))).loss.item()
    say = print if fz.init_distributed().rank == 0 else lambda text: None

    state, losses = first.init(params), []
    for n in range(updates):
        state, metrics = first(state, first.local_rows(counting(rows, n)))
    before = chance(first, state)
    say(f"after {updates} updates on texts: loss {metrics.loss:.3f} a word, counts up with chance {before:.3f}")
    reference, policy = fz.frozen(state, first), second.init(first.params(state))
    for n in range(updates):
        policy, metrics = second(policy, second.local_rows(pairs(n)))
        losses.append(metrics.loss.item())
    after = chance(second, policy)
    say(f"after {updates} updates on pairs: loss {metrics.loss:.3f} a pair, counts up with chance {after:.3f}")
    return before, after, losses


if __name__ == "__main__":
    main()

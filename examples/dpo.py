"""A language model learns to prefer one kind of answer to another, kept near what it was (DPO).

Shows: a reference that a loss reads and nobody moves. `fz.frozen(state, step)` is the state that training on texts has
ended with, read where it lies: cut over the ranks, without a copy, a gradient or moments.

Run: python examples/dpo.py, or torchrun --nproc-per-node=2 examples/dpo.py
Expect: the supervised model counts up as often as down, for so does its text; after the second part it counts up.
Found: counts up with chance 0.455 after texts and 1.000 after pairs, on one process.
"""

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz

WORDS, LENGTH, BETA = 16, 8, 0.2


def counting(rows, seed, by=(1, -1)):
    """Texts that count from anywhere, up or down, modulo the number of words."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(WORDS, (rows, 1), generator=g)
    step = torch.tensor(by)[torch.randint(len(by), (rows, 1), generator=g)]
    return (start + step * torch.arange(LENGTH)) % WORDS


class Model(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.memory = nn.GRU(width, width, batch_first=True)

    def forward(self, text):
        return self.head(self.memory(self.embed(text))[0])


def main(updates=100, rows=32, stage=3, accumulate=1):
    """Trains twice; returns how often texts count up after each part, and the last loss."""
    torch.manual_seed(0)
    model = Model()

    def log_prob(params, text):  # of every row, of all words after the first
        logits = torch.func.functional_call(model, params, (text[:, :-1],))
        return -F.cross_entropy(logits.mT, text[:, 1:], reduction="none").sum(1)

    apart = lambda params, pairs: log_prob(params, pairs["up"]) - log_prob(params, pairs["down"])
    upward = lambda params, pairs: (apart(params, pairs).sigmoid().sum(), len(pairs["up"]))
    likely = lambda params, text: (-log_prob(params, text).sum(), text[:, 1:].numel())

    def preferred(params, pairs):
        """-log sigmoid of how much more than its reference the policy prefers to count up."""
        with torch.no_grad():
            before = apart(reference.params(), pairs)
        return -F.logsigmoid(BETA * (apart(params, pairs) - before)).sum(), len(before)

    def built(loss_fn, lr, mesh):
        grad = fz.value_and_grad(loss_fn, batch=fz.P("data"))
        return fz.train_step(*fz.zero(grad, fz.adamw(lr), stage=stage, accumulate=accumulate), mesh=mesh)

    first = built(likely, 1e-2, {"data": -1})
    second = built(preferred, 3e-3, first.mesh)
    pairs = lambda n: {"up": counting(rows, n, (1,)), "down": counting(rows, n, (-1,))}
    chance = lambda step, state: step.eval(upward)(state, step.local_rows(pairs(0))).loss.item()
    say = print if fz.init_distributed().rank == 0 else lambda text: None
    state = first.init(dict(model.named_parameters()))
    for n in range(updates):
        state, metrics = first(state, first.local_rows(counting(rows, n)))
    before = chance(first, state)
    say(f"after {updates} updates on texts: loss {metrics.loss:.3f} a word, counts up with chance {before:.3f}")
    reference, policy = fz.frozen(state, first), second.init(first.params(state))
    for n in range(updates):
        policy, metrics = second(policy, second.local_rows(pairs(n)))
    after = chance(second, policy)
    say(f"after {updates} updates on pairs: loss {metrics.loss:.3f} a pair, counts up with chance {after:.3f}")
    return before, after, metrics.loss.item()


if __name__ == "__main__":
    main()

"""A model that counts by one is taught to count by three, by adapters of rank two beside weights in int8 (QLoRA).

Shows: what learns and what does not are two values. `fz.beside` splits a loss into adapters, which are the state, and
the rest, which `fz.frozen` lays down once: cut over the ranks and in 8 bits. Gradients, moments and checkpoints are of
the adapters alone; a block's weights are widened as it runs.

Run: python examples/lora.py, or torchrun --nproc-per-node=2 examples/lora.py
Expect: some hundredths of the parameters learn, and the loss on the new text falls to nearly nothing.
Found: loss 0.000 where texts count by one; by three 19.7 at first and 0.000 after 60 updates, on one process.
"""

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz

WORDS, LENGTH = 16, 8


def counting(rows, seed, by):  # from anywhere, modulo the number of words
    start = torch.randint(WORDS, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (start + by * torch.arange(LENGTH)) % WORDS


class Model(nn.Module):
    def __init__(self, width=64, depth=3):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        up, down = lambda: nn.Linear(width, 4 * width), lambda: nn.Linear(4 * width, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), up(), nn.GELU(), down()) for _ in range(depth))

    def forward(self, text):
        x = self.embed(text)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def loss(model, text):
    return F.cross_entropy(model(text[:, :-1]).mT, text[:, 1:], reduction="sum"), text[:, 1:].numel()


def trained(step, params, by, updates, rows):
    """The state after some updates on texts that count so, and the losses."""
    state, losses = step.init(params), []
    for n in range(updates):
        state, metrics = step(state, step.local_rows(counting(rows, n, by)))
        losses.append(metrics.loss.item())
    return state, losses


def main(updates=100, rows=32, stage=2, accumulate=1):
    """Trains a model, then its adapters; returns the losses of both."""
    torch.manual_seed(0)

    def built(loss_fn, lr, mesh, stage):
        grad = fz.value_and_grad(loss_fn, batch=fz.P("data"))
        return fz.train_step(*fz.zero(grad, fz.adamw(lr), stage=stage, accumulate=accumulate), mesh=mesh)

    model = Model()
    loss_fn, params = fz.stateless(model, loss)
    step = built(loss_fn, 3e-3, {"data": -1}, 3)
    state, first = trained(step, params, 1, updates, rows)
    model.load_state_dict(step.params(state))

    adapters = fz.lora(rank=2, match=r"blocks\.\d\.[13]", alpha=8)
    loss_fn, params, rest = fz.beside(*fz.stateless(adapters.module(model), loss), lambda: base)
    step = built(loss_fn, 1e-2, step.mesh, stage)
    base = fz.frozen(rest, step, storage="int8")
    state, second = trained(step, params, 3, updates, rows)
    if fz.init_distributed().rank == 0:
        learn, stay = (sum(x.numel() for x in tree.values()) for tree in (params, rest))
        print(f"{stay:,} parameters learn to count by one: loss {first[0]:.3f}, then {first[-1]:.3f}")
        print(f"beside them in {base.nbytes:,} bytes, {learn:,} count by three: {second[0]:.2f}, then {second[-1]:.3f}")
    return first, second


if __name__ == "__main__":
    main()

"""A paddle learns to catch what falls: advantage actor-critic in many games at once.

Shows: data that depend on what was learned. Each rank plays its own games with `step.view(state)`, the parameters as
they are now, and hands what it saw to the step, whose rows they are. A move is a function of the game's key, so games
are the same on any number of ranks. One loss has both heads; `fz.partition` gives the critic's an optimizer of its own.

Run: python examples/actor_critic.py, or torchrun --nproc-per-node=2 examples/actor_critic.py
Expect: the share of caught balls rises from that of chance, 0.3, to nearly all.
Found: 0.54 caught after 50 updates, 0.84 after 100, 0.96 after 150, on one process.
"""

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz
from funczero import P, rng

HEIGHT, WIDTH = 6, 5


class ActorCritic(nn.Module):
    """Logits of left, stay and right, and the value of a moment of play."""

    def __init__(self, width=64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(HEIGHT + 2 * WIDTH, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.actor, self.critic = nn.Linear(width, 3), nn.Linear(width, 1)

    def forward(self, seen):
        x = self.trunk(seen)
        return self.actor(x), self.critic(x)[..., 0]


def play(model, keys):
    """A game for each key, to its end: [games, moves, ...] seen, [games, moves] done, [games] whether it was caught."""
    draws = rng.row_uniform(keys, (HEIGHT + 2,))
    ball, paddle = (WIDTH * draws[:, :2]).long().T
    seen, done = [], []
    for height, drawn in enumerate(draws[:, 2:].T):
        places = (torch.full_like(ball, height), HEIGHT), (ball, WIDTH), (paddle, WIDTH)
        seen.append(torch.cat([F.one_hot(at, n) for at, n in places], 1).float())
        chances = model(seen[-1])[0].softmax(1).cumsum(1)
        done.append((drawn[:, None] > chances[:, :2]).sum(1))
        paddle = (paddle + done[-1] - 1).clamp(0, WIDTH - 1)
    return torch.stack(seen, 1), torch.stack(done, 1), (ball == paddle).float()


def loss(model, batch):
    """The policy's gradient with the advantage, half its square for the critic, and a little entropy."""
    logits, value = model(batch["seen"])
    advantage = batch["caught"][:, None] - value
    log = logits.log_softmax(-1)
    taken = log.gather(-1, batch["done"][..., None])[..., 0]
    each = -taken * advantage.detach() + advantage.square() / 2 + 0.01 * (log.exp() * log).sum(-1)
    return each.sum(), each.numel(), {"caught": batch["caught"].sum()}


def main(updates=150, games=64, stage=3, accumulate=1):
    """Learns; returns the share of balls that each update's games caught, and the loss."""
    torch.manual_seed(0)
    net, said = ActorCritic(), []
    loss_fn, params = fz.stateless(net, loss)
    grad = fz.value_and_grad(loss_fn, batch=P("data"), has_aux=True)
    parts = fz.partition([("critic", fz.sgd(0.1)), ("", fz.adamw(3e-3))])
    step = fz.train_step(*fz.zero(grad, parts, stage=stage, accumulate=accumulate), mesh={"data": -1})
    state = step.init(params)
    for n in range(updates):
        keys, now = step.local_rows(rng.row_keys(rng.fold(0, n), games)), step.view(state)
        with torch.no_grad():
            seen, done, caught = play(lambda x, now=now: torch.func.functional_call(net, now, (x,)), keys)
        state, metrics = step(state, {"seen": seen, "done": done, "caught": caught})
        said.append({"caught": metrics.aux["caught"].item() / games, "loss": metrics.loss.item()})
        if fz.init_distributed().rank == 0 and (n + 1) % 50 == 0:
            print(f"after {n + 1} updates: caught {sum(x['caught'] for x in said[-20:]) / 20:.2f} of the last games")
    return said


if __name__ == "__main__":
    main()

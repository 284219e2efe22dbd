"""Two convolutional networks learn from each other: one draws rings, the other tells them from real ones (DCGAN).

Shows: two steps on one mesh. Each loss reads the other network as `fz.frozen(state, step)`: a state as a value, cut
where it lies, with its batch norms' statistics; no gradient reaches it, and nothing is switched off and on.

Run: python examples/dcgan.py, or torchrun --nproc-per-node=2 examples/dcgan.py
Expect: what is drawn comes nearer to real images, and looks like rings.
Found: rings can be seen after 300 updates, on one process.
"""

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz

SIDE, CODE = 12, 16


def rings(rows, seed):
    """Images of one ring each, and noise to draw others from: a function of the seed."""
    g = torch.Generator().manual_seed(seed)
    middle, radius = 4 + 3 * torch.rand(2, rows, 1, 1, 1, generator=g), 2 + 2 * torch.rand(rows, 1, 1, 1, generator=g)
    at = torch.arange(float(SIDE))
    away = ((at[:, None] - middle[0]).square() + (at - middle[1]).square()).sqrt() - radius
    return {"x": (-away.square()).exp() * 2 - 1, "noise": torch.randn(rows, CODE, 1, 1, generator=g)}


def networks(width=32):
    """Noise to an image; an image to a logit."""
    up = lambda a, b, *size: (nn.ConvTranspose2d(a, b, *size, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    down = lambda a, b, *size: (nn.Conv2d(a, b, *size, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))
    draw = *up(CODE, 2 * width, 3), *up(2 * width, width, 4, 2, 1), nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh()
    judge = *down(1, width, 4, 2, 1), *down(width, 2 * width, 4, 2, 1), nn.Conv2d(2 * width, 1, 3), nn.Flatten(0)
    return nn.Sequential(*draw), nn.Sequential(*judge)


def main(updates=300, rows=64, stage=3, accumulate=1):
    """Trains; returns both losses of every update."""
    torch.manual_seed(0)
    draw, judge = networks()
    fooled = lambda x, real: F.binary_cross_entropy_with_logits(x, torch.full_like(x, real), reduction="sum")

    def read(net, frozen, x):  # what batch norms would leave behind is dropped
        return torch.func.functional_call(net, frozen.params() | fz.tree.clone(frozen.model_state), (x,))

    def judging(judge, batch):
        with torch.no_grad():
            drawn = read(draw, batch["other"], batch["noise"])
        return fooled(judge(batch["x"]), 1.0) + fooled(judge(drawn), 0.0), len(drawn)

    def drawing(draw, batch):
        logits = read(judge, batch["other"], draw(batch["noise"]))
        return fooled(logits, 1.0), len(logits)

    def built(net, loss, mesh):
        loss_fn, params = fz.stateless(net, loss)
        grad = fz.value_and_grad(loss_fn, batch=fz.P("data"))
        step = fz.train_step(*fz.zero(grad, fz.adam(1e-3, b1=0.5), stage=stage, accumulate=accumulate), mesh=mesh)
        return step, step.init(params)

    judges, critic = built(judge, judging, {"data": -1})
    draws, artist = built(draw, drawing, judges.mesh)  # one mesh for both
    losses, noise = [], rings(6, 1)["noise"]
    for n in range(updates):
        batch = judges.local_rows(rings(rows, 2 + n))
        critic, judged = judges(critic, batch | {"other": fz.frozen(artist, draws)})
        artist, drawn = draws(artist, batch | {"other": fz.frozen(critic, judges)})
        losses.append((judged.loss.item(), drawn.loss.item()))
        if (n + 1) % 100 == 0:
            images = torch.func.functional_call(draw, draws.params(artist) | artist.model_state, (noise,)).movedim(0, 2)
            shade = lambda x: " .:-=+*#%@"[int(x.clamp(-1, 0.99) * 5 + 5)]
            if fz.init_distributed().rank == 0:
                print(f"after {n + 1} updates the losses are {losses[-1]}")
                print(*("".join(map(shade, line.flatten())) for line in images[0]), sep="\n")
    return losses


if __name__ == "__main__":
    main()

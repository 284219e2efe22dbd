"""A variational autoencoder finds that images of rings have three numbers: two of the place and one of the size.

Shows: what a loss draws is a function of each row's key, `fz.rng.row_normal(batch["key"], ...)`, so it is drawn alike
on whichever rank it lies. The two terms of the bound are its aux: sums that travel with the loss and are logged.

Run:
    python examples/vae.py --stage=3 --nproc=2
    python examples/vae.py --nproc=1 --accumulate=2 --out=runs/vae1
Expect: both print one result. The bound falls, some of the eight numbers of a code are used (KL is in nats), and what
    is decoded from noise are rings.
Found: the first eight losses are plain torch's to 2e-7, at stages 0 and 3 on one and two processes;
    28 to 33 nats after 600 updates, on one process, of which KL is 16; what is drawn are rings.
"""

import torch
from torch import nn

import funczero as fz
from funczero import rng

SIDE, CODE, SPREAD = 12, 8, 0.1  # pixels, numbers of a code, deviation of a pixel


def rings(rows, seed):
    """Images of one ring each, and a key for what is drawn for it: a function of the seed."""
    g = torch.Generator().manual_seed(seed)
    middle, radius = 4 + 3 * torch.rand(2, rows, 1, 1, generator=g), 2 + 2 * torch.rand(rows, 1, 1, generator=g)
    at = torch.arange(float(SIDE))
    away = ((at[:, None] - middle[0]).square() + (at - middle[1]).square()).sqrt() - radius
    return {"x": (-away.square()).exp(), "key": rng.row_keys(seed, rows)}


class VAE(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        layers = lambda a, b: (nn.Linear(a, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, b))
        self.encoder = nn.Sequential(nn.Flatten(), *layers(SIDE * SIDE, 2 * CODE))
        self.decoder = nn.Sequential(*layers(CODE, SIDE * SIDE), nn.Unflatten(1, (SIDE, SIDE)))

    def forward(self, x, noise):
        """The image again, and mean and log deviation of its code."""
        mean, log_std = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + log_std.exp() * noise), mean, log_std


def loss(vae, batch):
    """The negative evidence lower bound: how far the image is from what came back, and how far codes are from noise."""
    again, mean, log_std = vae(batch["x"], rng.row_normal(batch["key"], (CODE,)))
    error = (again - batch["x"]).square().sum() / (2 * SPREAD**2)
    kl = (mean.square() + (2 * log_std).exp() - 1).sum() / 2 - log_std.sum()
    return error + kl, len(mean), {"error": error, "kl": kl}


def drawn(images):
    """Images side by side, in letters."""
    shade = lambda x: " .:-=+*#%@"[int(x.clamp(0, 0.99) * 10)]
    return "\n".join("  ".join("".join(map(shade, image[i])) for image in images) for i in range(SIDE))


def begin(run):
    vae = VAE()
    loss_fn, params = fz.stateless(vae, loss)
    grad = fz.value_and_grad(loss_fn, batch=fz.P(run.axis), has_aux=True)
    step = run.train_step(grad, fz.adamw(3e-3, weight_decay=0.0))

    @torch.no_grad()
    def finish(state):
        vae.load_state_dict(step.params(state))
        return drawn(vae.decoder(rng.row_normal(rng.row_keys(run.seed, 6), (CODE,))))

    numbers = lambda m: {name: (x / m.weight).item() for name, x in m.aux.items()}
    batch = lambda n: rings(run.batch, run.seed + n)
    return fz.Experiment(step, params, batch, numbers=numbers, finish=finish, unit="images", plot=("error", "kl"))


if __name__ == "__main__":
    fz.experiment(begin, rows="images", steps=600, batch=64)

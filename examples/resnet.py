"""A ResNet with batch norm learns to read digits; its running statistics are a state of the model.

Shows: batch norm normalises by one micro-batch, and its running statistics are leaves of `state.model_state` whose rule
is a mean: every micro-batch of an update reads the last ones and leaves its own, and their average counts. A mean has
no order, so ranks, stages and worlds agree on them. `step.eval` hands them to the network that evaluates.

Run:
    python examples/resnet.py --stage=3 --nproc=2
    python examples/resnet.py --nproc=1 --accumulate=2 --out=runs/resnet1
Expect: both print one result, for the micro-batches are the same; nearly all digits are read.
Found: the first eight losses are plain torch's to 2e-7, at stages 0 and 3 on one and two processes;
    0.957 of the held-out digits are read after 100 updates, on one process.
"""

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz

PARTS = [(0, slice(4)), (slice(4), 0), (slice(4), 3), (3, slice(4)), (slice(3, 7), 0), (slice(3, 7), 3), (6, slice(4))]
DIGITS = (0x77, 0x12, 0x5D, 0x5B, 0x3A, 0x6B, 0x6F, 0x52, 0x7F, 0x7B)  # which parts of 0 to 9 are lit, in bits


def digits(rows, seed):
    """Seven-segment digits somewhere in 8 x 8 noisy pixels, and which they are: a function of the seed."""
    glyphs = torch.zeros(10, 7, 4)
    for glyph, lit in zip(glyphs, DIGITS):
        for stroke, on in zip(PARTS, f"{lit:07b}"):
            glyph[stroke] += float(on)
    g = torch.Generator().manual_seed(seed)
    y, left = torch.randint(10, (rows,), generator=g), torch.randint(5, (rows,), generator=g)
    x = 0.3 * torch.randn(rows, 1, 8, 8, generator=g)
    for image, digit, at in zip(x, y, left):
        image[0, :7, at : at + 4] += glyphs[digit].clamp(max=1)
    return {"x": x, "y": y}


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, width):
        super().__init__()
        conv = lambda: nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.layers = nn.Sequential(conv(), nn.BatchNorm2d(width), nn.ReLU(), conv(), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(x + self.layers(x))


class ResNet(nn.Module):
    def __init__(self, width=8, depth=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks, self.head = nn.ModuleList(Block(width) for _ in range(depth)), nn.Linear(16 * width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:  # at stage 3 each is gathered as it runs
            x = block(x)
        return self.head(F.avg_pool2d(x, 2).flatten(1))


def begin(run):
    net = ResNet()
    loss = lambda net, b: (F.cross_entropy(net(b["x"]), b["y"], reduction="sum"), len(b["y"]))
    hits = lambda net, b: ((net(b["x"]).argmax(1) == b["y"]).float().sum(), len(b["y"]))
    loss_fn, params = fz.stateless(net, loss)
    right, _ = fz.stateless(net.eval(), hits)
    sgd = fz.sgd(fz.schedules.warmup_cosine(0.05, min(10, run.steps), run.steps), momentum=0.9, weight_decay=5e-4)
    step = run.train_step(fz.value_and_grad(loss_fn, batch=fz.P(run.axis)), sgd)
    held, ask = digits(256, run.seed + 1), step.eval(right)
    accuracy = lambda state: {"accuracy": ask(state, step.local_rows(held)).loss.item()}
    return fz.Experiment(step, params, lambda n: digits(run.batch, run.seed + 2 + n), evaluate=accuracy)


if __name__ == "__main__":
    fz.experiment(begin, rows="images", steps=100, batch=64, eval_every=50)

"""Two encoders learn which picture belongs to which caption; every pair is told from all others of the global batch.

Shows: a loss that is no sum over rows. Each rank encodes its own rows and joins what all ranks made of theirs with
`gather_rows`, whose transpose hands every rank's derivative back to the rank of the row; its part of the loss is the
sum over its own rows. So the gradient is that of the one large batch, at every stage. Micro-batches in time would be
told from each other alone, which is another loss, and is refused here.

Run:
    python examples/contrastive.py --stage=3 --nproc=2
    python examples/contrastive.py --stage=0 --nproc=1 --out=runs/contrastive1
Expect: the losses of both agree to rounding; of 64 held-out captions nearly every picture finds its own.
Found: of 64 captions 0.02 find their picture at the start and all after 100 updates, on one process.
"""

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz
from funczero.comm.adjoint import gather_rows

WORDS, LENGTH, PIXELS, WIDTH = 24, 6, 32, 32


def pairs(rows, seed):
    """Captions of some words, and pictures in which every word has left its pattern, in noise."""
    patterns = torch.randn(WORDS, PIXELS, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (rows, LENGTH), generator=g)
    return {"words": words, "picture": patterns[words].sum(1) + 0.5 * torch.randn(rows, PIXELS, generator=g)}


class Clip(nn.Module):
    """Captions and pictures as points of one sphere."""

    def __init__(self):
        super().__init__()
        self.words, self.picture = nn.EmbeddingBag(WORDS, WIDTH), nn.Linear(PIXELS, WIDTH)
        block = lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.below, self.beside = (nn.ModuleList(block() for _ in range(2)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch):
        texts, pictures = self.words(batch["words"]), self.picture(batch["picture"])
        for block, other in zip(self.below, self.beside):
            texts, pictures = texts + block(texts), pictures + other(pictures)
        return F.normalize(texts, dim=1) * self.scale.exp(), F.normalize(pictures, dim=1)


def begin(run):
    if run.accumulate > 1 or run.micro_batch:
        raise ValueError("pairs are told from the others of one micro-batch; leave --accumulate and --micro_batch out")
    everywhere = lambda x: gather_rows(x, "data", step.live_mesh)  # the rows of all ranks, in their order

    def asked(clip, batch, measure):
        """Which of all pictures belongs to each caption of this rank, and the reverse."""
        texts, pictures = clip(batch)
        first = len(texts) * step.live_mesh.index("data")
        own = torch.arange(first, first + len(texts))
        each = measure(texts @ everywhere(pictures).T, own) + measure(pictures @ everywhere(texts).T, own)
        return each / 2, len(own)

    loss = lambda clip, batch: asked(clip, batch, lambda x, own: F.cross_entropy(x, own, reduction="sum"))
    hits = lambda clip, batch: asked(clip, batch, lambda x, own: (x.argmax(1) == own).float().sum())
    (loss_fn, params), (found, _) = (fz.stateless(clip, of) for clip in [Clip()] for of in (loss, hits))
    step = run.train_step(fz.value_and_grad(loss_fn, batch=fz.P("data")), fz.adamw(3e-3))
    held, ask = pairs(64, run.seed + 1), step.eval(found)
    recall = lambda state: {"recall": ask(state, step.local_rows(held)).loss.item()}
    return fz.Experiment(step, params, lambda n: pairs(run.batch, run.seed + 2 + n), evaluate=recall, unit="pairs")


if __name__ == "__main__":
    fz.experiment(begin, rows="pairs", steps=100, batch=64)

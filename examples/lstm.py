"""An LSTM reads Python's own library letter by letter; its hidden state goes on from update to update.

Shows: truncated backpropagation through time. The hidden state is a state of the model whose rule is "rows": every row
of a batch has a part of its own, travels with it to the rank that reads it, and reads what it left in the update
before. So texts that are read in pieces are read on, on any number of processes.

Run:
    python examples/lstm.py --stage=3 --nproc=2
    python examples/lstm.py --nproc=1 --accumulate=2 --out=runs/lstm1
Expect: both print one result. The loss, in nats a letter, falls from 5.5, which is log 256, to well below 3.2, the
    entropy of single letters; the sample has words and lines.
Found: the first eight losses are plain torch's to 2e-7, at stages 0 and 3 on one and two processes;
    1.7 to 2.0 nats a letter after 300 updates, on one process, and a sample that begins `def = self):`.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz

LENGTH, WIDTH, LAYERS = 32, 96, 1  # letters of a piece
corpus = cache(lambda: fz.data.load()[0])  # Python's own library, where it lies
silence = lambda rows: (torch.zeros(rows, LAYERS, WIDTH), torch.zeros(rows, LAYERS, WIDTH))  # before anything was read


class Letters(nn.Module):
    """Logits of the letter after each; hidden states are [rows, layers, width]."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True)

    def forward(self, text, hidden):
        seen, hidden = self.lstm(self.embed(text), tuple(x.transpose(0, 1).contiguous() for x in hidden))
        return self.head(seen), tuple(x.transpose(0, 1) for x in hidden)


def pieces(rows, n, seed=0):
    """The n-th piece of as many texts, and what follows each letter."""
    starts = torch.randint(len(corpus()) // 2, (rows,), generator=torch.Generator().manual_seed(seed))
    text = torch.from_numpy(fz.data.read(corpus(), (starts + n * LENGTH).tolist(), LENGTH + 1)).long()
    return {"x": text[:, :-1], "y": text[:, 1:]}


def sampled(net, text, letters, g):
    """The text with as many letters more."""
    tokens, hidden = list(text.encode()), silence(1)
    new = torch.tensor([tokens])
    for _ in range(letters):
        logits, hidden = net(new, hidden)
        new = torch.multinomial((logits[:, -1] / 0.7).softmax(-1), 1, generator=g)
        tokens.append(int(new))
    return bytes(tokens).decode(errors="replace")


def begin(run):
    net = Letters()

    def loss_fn(params, hidden, batch):
        logits, hidden = torch.func.functional_call(net, params, (batch["x"], hidden))
        return F.cross_entropy(logits.mT, batch["y"], reduction="sum"), batch["y"].numel(), hidden

    grad = fz.value_and_grad(loss_fn, batch=fz.P(run.axis), state=silence(run.batch), rules=[("", "rows")])
    step = run.train_step(grad, fz.clip_by_global_norm(1.0), fz.adamw(1e-2))

    @torch.no_grad()
    def finish(state):
        net.load_state_dict(step.params(state))
        return sampled(net, "def ", 200, torch.Generator().manual_seed(run.seed))

    batch = lambda n: pieces(run.batch, n, run.seed)
    return fz.Experiment(step, dict(net.named_parameters()), batch, finish=finish, unit="letters", per_row=LENGTH)


if __name__ == "__main__":
    fz.experiment(begin, rows="texts", steps=300, batch=16)

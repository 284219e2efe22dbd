"""An LSTM language model whose hidden state goes on from update to update: truncated backpropagation through time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import Pair, seeded
from torch import nn

import funczero as fz
from funczero import P

ROWS, LONG, VOCAB, DIM, LAYERS = 4, 5, 11, 6, 2


class Model(nn.Module):
    """Embedding, two LSTMs, head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.lstm = nn.LSTM(DIM, DIM, LAYERS, batch_first=True)

    def forward(self, tokens, hidden):
        """Hidden states come and go by rows: [rows, layers, dim]."""
        out, hidden = self.lstm(self.embed(tokens), tuple(x.transpose(0, 1).contiguous() for x in hidden))
        return self.head(out), tuple(x.transpose(0, 1) for x in hidden)


def text(t):
    """The next piece of every row's text, and what follows each token."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (ROWS, 4 * LONG + 1), generator=g)[:, t * LONG : (t + 1) * LONG + 1]
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def nothing():
    return torch.zeros(ROWS, LAYERS, DIM, dtype=torch.float64), torch.zeros(ROWS, LAYERS, DIM, dtype=torch.float64)


def sharded(stage, accumulate):
    module = seeded(lambda: Model().double())

    def loss(params, hidden, batch):
        logits, hidden = torch.func.functional_call(module, params, (batch["x"], hidden))
        nll = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), reduction="sum")
        return nll, torch.tensor(float(batch["y"].numel())), hidden

    grad = fz.value_and_grad(loss, batch=P("data"), state=nothing(), rules=[("", "rows")])
    chain = fz.zero(grad, fz.clip_by_global_norm(0.5), fz.adamw(1e-2), stage=stage, accumulate=accumulate)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    state, losses = step.init({n: p.detach() for n, p in module.named_parameters()}), []
    for t in range(4):
        state, metrics = step(state, step.local_rows(text(t)))
        losses.append(metrics.loss)
    return step.params(state), state.model_state, losses


def plain():
    module, hidden, losses = seeded(lambda: Model().double()), nothing(), []
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    for t in range(4):
        batch = text(t)
        logits, hidden = module(batch["x"], tuple(x.detach() for x in hidden))
        value = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten())
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        losses.append(value.detach())
    return {n: p.detach() for n, p in module.named_parameters()}, tuple(x.detach() for x in hidden), losses


def program():
    """Four pieces of four texts."""
    return Pair(sharded, plain)

"""Tokens drawn from a model's logits: by a plain loop, and each row's from that row's own key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funczero.core import rng
from funczero.core.number import flag, kind, number, whole


class Sampling(NamedTuple):
    """How the plain loop chooses tokens; names and meaning are those of transformers."""

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    eos: tuple[int, ...] = ()


def sampling(
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Sampling:
    """The plain loop's options, checked.

    Args:
      max_new_tokens: at most so many are added to every prompt.
      do_sample: draw; by default the likeliest token is taken.
      temperature: above 0, divides the logits.
      top_k: draw among so many tokens; 0 for all.
      top_p: draw among the likeliest tokens that together are at least so likely, 0 < top_p <= 1.
      eos_token_id: a row ends with it, or with one of several.

    Raises:
      TypeError, ValueError: a value is none of these; one shapes a draw where nothing is drawn.

    >>> sampling(4, do_sample=True, top_k=2).top_k
    2
    """
    own = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    idle = next((name for name, x in own.items() if x is not None), None)
    if not flag("generate", "do_sample", do_sample) and idle is not None:
        raise ValueError(f"generate: {idle}={own[idle]!r} shapes draws, and nothing is drawn; write do_sample=True")
    p = 1.0 if top_p is None else number("generate", "top_p", top_p, above=True)
    if p > 1:
        raise ValueError(f"generate: top_p={top_p!r} is no probability; write a number in (0, 1]")
    ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    return Sampling(
        whole("generate", "max_new_tokens", max_new_tokens, low=0),
        do_sample,
        1.0 if temperature is None else number("generate", "temperature", temperature, above=True),
        0 if top_k is None else whole("generate", "top_k", top_k, low=0),
        p,
        tuple(whole("generate", "eos_token_id", x, low=0) for x in ends),
    )


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """What a token is drawn from: logits [rows, vocabulary] over the temperature, then top_k, then top_p; float32.

    >>> probabilities(torch.tensor([[2.0, 1.0, 0.0]]), sampling(1, True, top_k=1)).tolist()
    [[1.0, 0.0, 0.0]]
    """
    logits = logits.float() / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        least = logits.topk(how.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if how.top_p < 1:
        ordered, places = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        dropped = p.cumsum(-1) - p >= how.top_p  # those before it are likely enough
        logits = logits.masked_fill(dropped.scatter(-1, places, dropped), -torch.inf)
    return logits.softmax(-1)


def drawn(p: Tensor, keys: Tensor, t: int) -> Tensor:
    """One token a row, int64 [rows * n], a function of the row's probabilities, its key and t alone.

    Args:
      p: [rows * n, vocabulary], n rows of probabilities a key, one after another.
      keys: int64 [rows].
      t: which of a row's draws this is.

    Raises:
      RuntimeError: a row of p holds inf, nan or a negative value, or nothing.
    """
    cumulated = p.double().cumsum(-1)
    total = cumulated[:, -1:]
    if not bool((torch.isfinite(total) & (total > 0)).all() & (p >= 0).all()):
        raise RuntimeError("generate: the probabilities of a token hold inf, nan or a negative value, or are all 0")
    n = len(p) // len(keys)
    u = rng.row_uniform(keys, (t + 1, n), torch.float64)[:, t].reshape(-1, 1)
    return torch.searchsorted(cumulated, u.to(p.device) * total, right=True).squeeze(-1)


class Draws(TorchFunctionMode):
    """Inside it `torch.multinomial` of one token a row draws from the rows' keys, and nothing from a generator."""

    def __init__(self, keys: Tensor) -> None:
        """keys: int64 [rows]; of a model that says several texts a prompt, its rows are neighbours."""
        super().__init__()
        self.keys, self.t = keys, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function; of a draw ours."""
        if func is torch.multinomial or func is Tensor.multinomial:
            return self._draw(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _draw(self, input: Tensor, num_samples: int, replacement: bool = False, **how: Any) -> Tensor:  # noqa: A002
        if num_samples != 1 or input.dim() != 2 or not len(self.keys) or len(input) % len(self.keys):
            what = f"{num_samples} tokens at a time from probabilities of shape {tuple(input.shape)}"
            why = f"and with {len(self.keys)} prompts these are not one a row, so that no row's key says which"
            raise ValueError(f"generate: the model draws {what}, {why}; write num_beams=1, or do_sample=False")
        self.t += 1
        return drawn(input, self.keys, self.t - 1)[:, None]


def continued(
    logits: Callable[[Tensor], Any], prompts: Sequence[Tensor], how: Sampling, keys: Tensor | None
) -> list[Tensor]:
    """Every prompt with its new tokens behind it, an end token included; int64, each of its own length.

    Prompts of one length run together and are not padded, and a row that has ended runs no more.

    Args:
      logits: int64 tokens [rows, time] -> [rows, time, vocabulary], or what has them as `.logits`.
      prompts: int64 [time], at least one token each.
      keys: int64, one a prompt; None where nothing is drawn.
    """
    out = list(prompts)
    for length in sorted({len(x) for x in prompts}):
        live = torch.tensor([i for i, x in enumerate(prompts) if len(x) == length])
        tokens = torch.stack([prompts[i] for i in live.tolist()])
        for t in range(how.max_new_tokens):
            scores = _last(logits(tokens), tokens)
            if how.do_sample:
                if keys is None:
                    raise ValueError("generate: do_sample=True, but no key says what is drawn; write key=0")
                new = drawn(probabilities(scores, how), keys[live].to(scores.device), t)
            else:
                new = scores.argmax(-1)
            tokens = torch.cat([tokens, new[:, None].to(tokens)], -1)
            for row, i in enumerate(live.tolist()):
                out[i] = tokens[row].clone()
            going = ~torch.isin(new, new.new_tensor(how.eos)).cpu()
            tokens, live = tokens[going.to(tokens.device)], live[going]
            if not len(live):
                break
    return out


def _last(found: Any, tokens: Tensor) -> Tensor:
    """The logits of the token after the last one, [rows, vocabulary]."""
    x = getattr(found, "logits", found)
    if not isinstance(x, Tensor):
        raise TypeError(
            f"generate: the model returns {kind(found)}; it must return logits, or what has them as .logits"
        )
    if x.dim() != 3 or x.shape[:2] != tokens.shape:
        why = f"its logits have shape {tuple(x.shape)} for tokens of shape {tuple(tokens.shape)}"
        raise ValueError(f"generate: {why}; return [rows, time, vocabulary]")
    return x[:, -1]

"""A GPT over bytes as pure functions: parameters are a dict, a block is a function, and the only seam that ZeRO needs
is `fz.layers`.

Pre-norm blocks with rotary positions, causal attention and a GELU MLP; no biases.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

import funczero as fz

VOCABULARY = 256  # a token is a byte


class Sizes(NamedTuple):
    """The shape of the model."""

    layers: int
    width: int  # features of a token
    heads: int  # features of a head are width / heads, an even number


def init(seed: int, sizes: Sizes) -> dict:
    """Float32 parameters, normal; what writes to the residual stream is divided by the root of how many do, so that its
    variance does not grow with depth.
    """
    layers, width, heads = sizes
    head = width // heads
    if heads * head != width or head % 2:
        raise ValueError(
            f"gpt: width {width} over {heads} heads leaves no even number of features a head; write a width that is a"
            f" multiple of {2 * heads}"
        )
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=g) * std

    inner, writer = 1 / math.sqrt(width), 1 / math.sqrt(2 * layers * width)
    blocks = [
        {
            "norm1": torch.ones(width),
            "qkv": normal(width, 3, heads, head, std=inner),
            "out": normal(width, width, std=writer),
            "norm2": torch.ones(width),
            "up": normal(width, 4 * width, std=inner),
            "down": normal(4 * width, width, std=writer / 2),  # its input has 4 * width features
        }
        for _ in range(layers)
    ]
    return {
        "embed": normal(VOCABULARY, width, std=1.0),
        "blocks": blocks,
        "norm": torch.ones(width),
        "head": normal(VOCABULARY, width, std=0.02),
    }


def rotary(time: int, head: int, device: torch.device) -> Tensor:
    """The angles by which feature pairs turn, as (cosine, sine): float32 [2, time, head / 2]."""
    speed = 10_000 ** -(torch.arange(0, head, 2, device=device) / head)
    angle = torch.arange(time, device=device)[:, None] * speed
    return torch.stack((angle.cos(), angle.sin()))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: the halves of a head's features, as pairs, turned by the angle of their time."""
    (cos, sin), (a, b) = angles.to(x.dtype), x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def block(p: dict, x: Tensor, angles: Tensor) -> Tensor:
    """One layer: x [batch, time, width] -> the same shape."""
    h = F.layer_norm(x, x.shape[-1:], p["norm1"])
    q, k, v = einsum(h, p["qkv"], "batch time width, width three heads head -> three batch heads time head")
    h = F.scaled_dot_product_attention(turn(q, angles), turn(k, angles), v, is_causal=True)
    x = x + rearrange(h, "batch heads time head -> batch time (heads head)") @ p["out"]
    h = F.layer_norm(x, x.shape[-1:], p["norm2"])
    return x + F.gelu(h @ p["up"], approximate="tanh") @ p["down"]


def logits(params: dict, tokens: Tensor, heads: int, remat: bool = False) -> Tensor:
    """Scores of the next byte: int64 [batch, time] -> [batch, time, 256]."""
    x = F.embedding(tokens, params["embed"])
    x = fz.layers(block, params["blocks"], x, rotary(tokens.shape[1], x.shape[-1] // heads, x.device), remat=remat)
    return F.layer_norm(x, x.shape[-1:], params["norm"]) @ params["head"].T


def loss_fn(params: dict, batch: dict, heads: int, remat: bool = False) -> tuple[Tensor, Tensor]:
    """(sum of -log p of the bytes `y` that follow `x`, in nats, float32; how many bytes)."""
    scores = rearrange(logits(params, batch["x"], heads, remat), "batch time vocabulary -> (batch time) vocabulary")
    nll = F.cross_entropy(scores.float(), batch["y"].flatten(), reduction="sum")
    return nll, nll.new_tensor(batch["y"].numel())


@torch.no_grad()
def sample(
    params: dict, heads: int, prompt: bytes, n: int, length: int, temperature: float, generator: torch.Generator
) -> bytes:
    """The prompt and `n` bytes drawn after it, each from the `length` bytes before it; `params` are whole plain
    tensors.
    """
    text = list(prompt)
    for _ in range(n):
        window = torch.tensor([text[-length:]], device=params["embed"].device)
        p = (logits(params, window, heads)[0, -1].float() / temperature).softmax(-1).cpu()
        text.append(int(torch.multinomial(p, 1, generator=generator)))
    return bytes(text)

"""The GPT of `bench_models.py` in JAX: parameters, gradients and moments sharded over host devices by shard_map, every
block gathered for its forward and again for its backward. A part of `bench_step.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_models import ADAMW, Batch, Size

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
import jax  # noqa: E402  (it looks at the flag when it is first used)
import jax.numpy as jnp  # noqa: E402
from jax import Array, lax  # noqa: E402
from jax.ad_checkpoint import checkpoint_name  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

jax.config.update("jax_platforms", "cpu")
GATHERED = "gathered"


def norm(x: Array, w: Array, b: Array) -> Array:
    """Layer norm over the last dim, as torch's."""
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * w + b


def block(p: dict[str, Array], x: Array, heads: int) -> Array:
    """One pre-norm transformer block, x: [B, T, d]."""
    B, T, d = x.shape
    h = norm(x, p["ln1_w"], p["ln1_b"]) @ p["qkv_w"].T + p["qkv_b"]
    q, k, v = (t.reshape(B, T, heads, d // heads) for t in jnp.split(h, 3, axis=2))
    a = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, T, d)
    x = x + a @ p["out_w"].T + p["out_b"]
    h = jax.nn.gelu(norm(x, p["ln2_w"], p["ln2_b"]) @ p["up_w"].T + p["up_b"], approximate=False)
    return x + h @ p["down_w"].T + p["down_b"]


def local_loss(params: Any, batch: dict[str, Array], heads: int, compute: Any, tokens: int) -> Array:
    """This device's part of the mean over all tokens; parameters are its rows of every leaf."""
    gather = lambda tree: jax.tree.map(
        lambda x: checkpoint_name(lax.all_gather(x.astype(compute), "data", tiled=True), GATHERED), tree
    )
    again = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_anything_except_these_names(GATHERED))
    rest = gather({k: v for k, v in params.items() if k != "blocks"})
    x = rest["embed"][batch["x"]] + rest["pos"]
    for p in params["blocks"]:
        x = again(lambda p, x: block(gather(p), x, heads))(p, x)
    logits = (norm(x, rest["ln_f_w"], rest["ln_f_b"]) @ rest["embed"].T).astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][..., None], axis=-1).sum() / tokens


def update(
    state: Any, batch: dict[str, Array], heads: int, compute: Any, clip: float, tokens: int
) -> tuple[Any, Array]:
    """One AdamW step on a device's rows: the new state, and the loss of all."""
    params, mu, nu, count = state
    loss, grads = jax.value_and_grad(local_loss)(params, batch, heads, compute, tokens)
    if clip:
        squares = lax.psum(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)), "data")
        grads = jax.tree.map(lambda g: g * jnp.minimum(1, clip / (jnp.sqrt(squares) + 1e-6)), grads)
    (b1, b2), lr, count = ADAMW["betas"], ADAMW["lr"], count + 1
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, nu, grads)
    step = lambda p, m, v: p * (1 - lr * ADAMW["weight_decay"]) - lr * (m / (1 - b1**count)) / (
        jnp.sqrt(v / (1 - b2**count)) + ADAMW["eps"]
    )
    return (jax.tree.map(step, params, mu, nu), mu, nu, count), lax.psum(loss, "data")


def step_of(tree: dict[str, Any], s: Size, clip: float, bf16: bool, ranks: int) -> Callable[[Batch], torch.Tensor]:
    """The train step over `ranks` host devices of this process."""
    mesh = jax.make_mesh((ranks,), ("data",), devices=jax.devices()[:ranks])
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    params = jax.tree.map(lambda x: put(x.numpy()), tree)
    count = jax.device_put(jnp.zeros(()), NamedSharding(mesh, P()))
    state = (params, *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)), count)
    specs = jax.tree.map(lambda x: x.sharding.spec, state)
    compute = jnp.bfloat16 if bf16 else jnp.float32
    body = partial(update, heads=s.heads, compute=compute, clip=clip, tokens=s.B * s.T)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, P()), check_vma=False)
    fast = jax.jit(mapped, donate_argnums=0)

    def step(batch: Batch) -> torch.Tensor:
        nonlocal state
        state, loss = fast(state, {k: put(v.numpy()) for k, v in batch.items()})
        return torch.tensor(float(loss))

    return step

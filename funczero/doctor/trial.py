"""The self-test: two processes of this machine train a tiny model under ZeRO-3 to the bits of one."""

from __future__ import annotations

import time

import torch

from funczero.doctor.findings import WELL, WRONG, Finding
from funczero.gradients.gradient import value_and_grad
from funczero.layout.spec import P
from funczero.optim import adamw
from funczero.step.train_step import train_step
from funczero.step.zero import zero
from funczero.testing import WorkerPool, tree_hash

SECONDS = 60.0  # for a machine that has much else to do; by itself it takes a few


def trained(size: int) -> str:
    """A hash of the parameters after three updates of four micro-batches, as one rank of so many."""

    def loss_fn(p: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return ((torch.tanh(b["x"] @ p["w"]) @ p["v"] - b["y"]) ** 2).sum(), torch.tensor(float(len(b["x"])))

    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)
    chain = zero(value_and_grad(loss_fn, batch=P("data")), adamw(0.01), stage=3, accumulate=4 // size)
    step = train_step(*chain, mesh={"data": size})
    state = step.init({"w": draw(8, 16), "v": draw(16, 1)})
    batch = {"x": draw(16, 8), "y": draw(16, 1)}
    for _ in range(3):
        state, _ = step(state, step.local_rows(batch))
    return tree_hash(step.params(state))


def trial() -> Finding:
    """Whether that works here, and how long it took, torch's import in the processes included."""
    begun, room = time.monotonic(), ("self-test", "two processes")
    try:
        hashes = {}
        for size in (1, 2):
            with WorkerPool(size) as pool:
                hashes[size] = pool.run(trained, size, timeout=SECONDS)
    except Exception as e:  # whatever stands in the way is what the reader wants to know
        said = (str(e).splitlines() or [""])[0]
        return Finding(*room, f"{type(e).__name__}: {said}", "ZeRO-3 over gloo", WRONG)
    seconds = time.monotonic() - begun
    if len({h for own in hashes.values() for h in own}) != 1:
        said = f"their parameters are not those of one process, after {seconds:.1f} s"
        return Finding(*room, said, "ZeRO-3 over gloo", WRONG)
    return Finding(*room, f"the bits of one process, in {seconds:.1f} s", "ZeRO-3 over gloo", WELL)

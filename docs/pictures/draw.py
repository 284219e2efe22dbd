"""The pictures of docs/algebra.md, drawn by `fz.visualize` of real chains. `python docs/pictures/draw.py` writes
them, and a test compares them with what it draws.
"""

from pathlib import Path

import torch

import funczero as fz

SHAPES = {"embed": (64, 16), "layer.w": (16, 16), "layer.b": (16,), "head": (10, 16)}
HERE = Path(__file__).parent


def pictures() -> dict[str, str]:
    """By file name."""
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    loss = lambda p, b: (p["embed"].sum(), torch.tensor(1.0))
    drawn = {}
    for name, mesh, chain in (
        ("stage0", {"data": 4}, lambda grad: (grad, fz.all_reduce("data"), fz.sgd(0.1))),
        ("stage3", {"data": 4}, lambda grad: (fz.shard("data", grad, fz.sgd(0.1)),)),
        ("hsdp", {"node": 2, "local": 2}, lambda grad: (fz.shard("local", grad, fz.all_reduce("node"), fz.sgd(0.1)),)),
        ("nested", {"node": 2, "local": 2}, lambda grad: (fz.shard("local", fz.shard("node", grad, fz.sgd(0.1))),)),
    ):
        step = fz.train_step(*chain(fz.value_and_grad(loss, batch=fz.P(tuple(mesh)))), mesh=mesh)
        drawn[f"{name}.svg"] = fz.visualize(step.specs(params)["params"], mesh).svg() + "\n"
    return drawn


if __name__ == "__main__":
    for file, svg in pictures().items():
        (HERE / file).write_text(svg)

"""Blocks of a module at the seam, where nothing is sharded."""

from __future__ import annotations

import pytest
import torch

from funczero.gradients.blocks import Again, Blocks, repeatable


def linear(own, args, kwargs):
    (x,) = args
    return x @ own["w"] * kwargs.get("scale", 1.0)


def again(seen):
    return Again(
        "engine", "gradient checkpointing", "leave it out", lambda path, out, own: seen.append((path, len(own)))
    )


def test_a_block_is_its_forward_and_may_run_again():
    blocks, seen = Blocks(["h.0", "h.1"], [{}, {}]), []
    w, x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, dtype=torch.float64)
    want = (x @ w * 2.0).sum()
    (grad,) = torch.autograd.grad(want, w)
    for checked in (None, again(seen)):
        out = blocks.run(1, {"w": w}, linear, (x,), {"scale": 2.0}, checked)
        assert torch.equal(torch.autograd.grad(out.sum(), w)[0], grad)
    assert seen[0] == ("h.1", 2)  # what it may read: its parameter, and its input


def test_a_block_that_changes_its_input_does_not_run_again():
    def writes(own, args, kwargs):
        args[0].add_(1)
        return args[0] @ own["w"]

    blocks, x = Blocks(["h.0"], [{}]), torch.ones(2, 3)
    why = (
        r"engine: unit 'h.0' runs again in the backward \(gradient checkpointing\), but changes an input in place;"
        r" write x = x \+ y, or leave it out"
    )
    with pytest.raises(RuntimeError, match=why):
        blocks.run(0, {"w": torch.ones(3, 3, requires_grad=True)}, writes, (x,), {}, again([]))
    with torch.no_grad():  # nothing runs again
        assert blocks.run(0, {"w": torch.ones(3, 3)}, writes, (x,), {}, again([])).shape == (2, 3)


def test_what_a_second_run_would_find_changed_is_refused():
    class Cache:
        def __init__(self):
            self.kept = []

    with pytest.raises(TypeError, match="stateless: unit 'h.0' runs again .* handed a Cache"):
        repeatable("h.0", (Cache(),), {})
    Cache.get_seq_length = lambda self: 0
    assert repeatable("h.0", (Cache(), 1), {"use_cache": True}) == ((None, 1), {"use_cache": False})

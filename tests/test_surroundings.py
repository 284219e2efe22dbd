"""What a block's values depend on beside its arguments is there again at its second run, and then as it was."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from funczero.gradients.surroundings import Uncached, here, restored

CPU = torch.device("cpu")
PLACES = {
    "plain": [],
    "autocast": [lambda: torch.autocast("cpu", torch.bfloat16)],
    "autocast of another kind": [lambda: torch.autocast("cpu", torch.float16)],
    "autocast that is off": [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", enabled=False),
    ],
    "float64": [lambda: default_dtype(torch.float64)],
}


class default_dtype:
    """The default dtype for a while."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error):
        torch.set_default_dtype(self.before)


def block():
    """What somebody's code computes without being handed anything: draws, narrow products, numbers of its own."""
    x = torch.rand(3, 3)
    return x @ x, torch.tensor(1.0) / 3, torch.empty(2).uniform_()


def bits(values):
    return [(x.dtype, x.flatten().tolist()) for x in values]


def at(place, fn):
    with ExitStack() as stack:
        for enter in PLACES[place]:
            stack.enter_context(enter())
        return fn()


def as_it_is():
    """All that a restore may not leave behind."""
    cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return *cast, torch.get_default_dtype(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("second", PLACES)
@pytest.mark.parametrize("first", PLACES)
def test_a_second_run_computes_what_the_first_did_wherever_it_runs(first, second):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        found, want = at(first, lambda: (here(CPU), bits(block())))
        torch.rand(5)  # the world has moved on

        def again():
            before = as_it_is()
            with restored(found):
                got = bits(block())
            return got, as_it_is() == before

        assert at(second, again) == (want, True)


def test_what_fails_inside_leaves_all_as_it_was():
    found = at("float64", lambda: at("autocast", lambda: here(CPU)))
    before = as_it_is()
    with pytest.raises(ArithmeticError), restored(found):
        assert torch.get_default_dtype() == torch.float64 and torch.is_autocast_enabled("cpu")
        torch.rand(3)
        raise ArithmeticError
    assert as_it_is() == before


def test_looking_changes_nothing():
    before = as_it_is()
    here(CPU)
    assert as_it_is() == before


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_keeps_no_cast_weights_while_it_is_without_its_cache(cached):
    """A weight that is a leaf would be cast once, and one that is a view at every use: the bits of its gradient."""
    torch.set_autocast_cache_enabled(cached)
    try:
        with pytest.raises(ArithmeticError), Uncached():
            assert not torch.is_autocast_cache_enabled()
            raise ArithmeticError
        assert torch.is_autocast_cache_enabled() is cached
    finally:
        torch.set_autocast_cache_enabled(True)

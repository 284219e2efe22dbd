"""A step knows the states that it made by the tensors they are, and keeps none of them alive."""

from __future__ import annotations

import gc

import checkpoints
import pytest
import torch

from funczero.step.book import Book


def state_of(step=0):
    """A state of one process; masters alone."""
    made, state = checkpoints.tiny(w=torch.arange(4.0) + step)
    return state


def test_a_state_as_it_was_returned_is_known():
    book, state = Book(), state_of()
    assert not book.made(state) and book.line(state) is None
    book.add(state)
    assert book.made(state) and book.line(state) is not None and not book.replaced(state)
    assert not book.made(state_of())  # equal values are not the same state


@pytest.mark.parametrize("change", ["written", "other masters", "another step"])
def test_what_was_changed_since_is_not(change):
    book, state = Book(), state_of()
    book.add(state)
    if change == "written":
        state.params.buffers[0].add_(1)
    elif change == "other masters":
        state = state._replace(params=state_of(1).params)
    else:
        state = state._replace(step=state.step.clone())
    assert not book.made(state)
    assert (book.line(state) is None) == (change == "another step")  # of its descent all the same


def test_a_book_keeps_no_state_alive_and_forgets_those_that_are_gone():
    book = Book()
    for i in range(200):
        book.add(state_of(i))
    gc.collect()
    assert sum(line.step() is not None for line in book.lines.values()) == 0 and len(book.lines) <= 66


def test_another_state_at_an_old_ones_address_is_not_taken_for_it():
    book = Book()
    for i in range(50):  # addresses are used again at once
        state = state_of(i)
        assert not book.made(state)
        book.add(state)
        assert book.made(state)
        del state

"""Numbers that somebody wrote: what is one is taken exactly, anything else is refused by name, argument and value."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from funczero.core.number import flag, number, shown, whole

ODD = ["1e-3", True, None, torch.tensor(1.0), [1], 1j, object]


@pytest.mark.parametrize("x", [0, 1, 0.1, 5e-324, 1e308, Fraction(1, 3), np.float32(0.1), np.int64(7)], ids=repr)
def test_a_number_is_its_float(x):
    assert number("adamw", "lr", x) == float(x) and type(number("adamw", "lr", x)) is float


@pytest.mark.parametrize("x", ODD, ids=shown)
def test_what_is_no_number_is_refused_as_what_it_is(x):
    for call in (number, whole):
        with pytest.raises(TypeError, match=r"^adamw: lr=.* is an? .* and no (whole )?number; write "):
            call("adamw", "lr", x)
    if not isinstance(x, bool):
        with pytest.raises(TypeError, match="neither True nor False"):
            flag("adamw", "lr", x)


@pytest.mark.parametrize("x", [math.inf, -math.inf, math.nan, 10**400, np.float64("nan")])
def test_what_is_not_finite_is_refused(x):
    with pytest.raises(ValueError, match=r"^adamw: lr=.* is not finite; write a finite number of at least 0$"):
        number("adamw", "lr", x)


@pytest.mark.parametrize(
    "x, low, high, above, why",
    [
        (-5e-324, 0, math.inf, False, "-5e-324 is below 0; write a finite number of at least 0"),
        (0, 0, math.inf, True, "0 is not above 0; write a finite number above 0"),
        (1, 0, 1, False, r"1 is not below 1; write a number in \[0, 1\)"),
        (0, 0, 1, True, r"0 is not above 0; write a number in \(0, 1\)"),
        (2, -math.inf, 2, False, "2 is not below 2; write a finite number"),
    ],
)
def test_the_ends_of_a_range(x, low, high, above, why):
    """The lower end belongs to it unless `above`, the upper one never does."""
    with pytest.raises(ValueError, match=f"^adamw: b1={why}$"):
        number("adamw", "b1", x, low, high, above)
    inside = math.nextafter(x, 0.5)
    assert number("adamw", "b1", inside, low, high, above) == inside


def test_whole_numbers_and_flags():
    assert whole("accumulate", "steps", 1) == 1 and whole("x", "y", -3, low=-3) == -3
    for x, error in ((0, ValueError), (1.0, TypeError), (np.int64(3), TypeError)):
        with pytest.raises(error):
            whole("accumulate", "steps", x)
    assert flag("x", "y", True) is True and flag("x", "y", False) is False


def test_a_message_is_one_short_line_whatever_the_value():
    for x in (torch.randn(50, 50), "x\n" * 1000, list(range(10000))):
        assert len(shown(x)) <= 60 and "\n" not in shown(x)

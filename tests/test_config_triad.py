"""The batch triad: DeepSpeed's cases, the law, and corrections that are valid."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from funczero.deepspeed.keys import ConfigError
from funczero.deepspeed.triad import NAMES, World, derive

number = st.none() | st.integers(-2, 40)


@given(number, number, number, st.integers(1, 9))
def test_a_triad_holds_or_says_two_ways_to_hold(batch, micro, steps, n):
    try:
        t = derive(batch, micro, steps, World(n, "given"))
    except ConfigError as e:
        assert len(e.fixes) == 2 and e.fixes[0] != e.fixes[1]
        for fix in e.fixes:
            derive(*(fix.get(name, x) for name, x in zip(NAMES, (batch, micro, steps))), World(n, "given"))
        for name, x in (*zip(NAMES, (batch, micro, steps)), ("world size ", n)):
            assert name in str(e) and str(x) in str(e) or x is None
        return
    assert t.batch == t.micro * t.steps * n and min(t) > 0
    for x, y in zip((batch, micro, steps), t):
        assert x is None or x == y

"""A step in words: the layout at every arrow, a line a part, and notes of what it cannot promise."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.step.describe import gathered
from funczero.testing import simulate, tree_hash

PRINTED = {
    0: (
        """
      value_and_grad(batch=P('data'))  -> sum, unreduced over ['data']
      accumulate(2)                    -> sum, unreduced over ['data'], of 2 micro-batches
      all_reduce('data')               -> sum, of 8 micro-batches
      mean                             -> mean, of 8 micro-batches
      sgd                              -> new parameters, of 8 micro-batches
    """
    ),
    1: (
        """
      value_and_grad(batch=P('data'))  -> sum, unreduced over ['data']
      accumulate(2)                    -> sum, unreduced over ['data'], of 2 micro-batches
      shard('data',                    -> sum, sharded over ['data'], of 8 micro-batches
        mean                           -> mean, sharded over ['data'], of 8 micro-batches
        sgd                            -> new parameters, sharded over ['data'], of 8 micro-batches
      )                                -> new parameters, of 8 micro-batches
    """
    ),
    3: (
        """
      shard('data',
        value_and_grad(batch=P('data'))  -> sum, sharded over ['data'], of 4 micro-batches
        accumulate(2)                    -> sum, sharded over ['data'], of 8 micro-batches
        mean                             -> mean, sharded over ['data'], of 8 micro-batches
        sgd                              -> new parameters, sharded over ['data'], of 8 micro-batches
    """
    ),
}


@pytest.mark.parametrize("stage", PRINTED)
def test_a_step_prints_its_layouts(stage):
    step = zoo.make(stage, k=2, mesh={"data": 4}, right=(fz.sgd(0.1),))
    _, *lines = str(step).splitlines()
    want = [line[4:] for line in PRINTED[stage].strip("\n").splitlines()[:-1]]
    assert [line.rstrip() for line in lines] == want
    assert repr(step).startswith("<Step ") and ", donated" in str(fz.donate(step)).splitlines()[0]


# --- notes ------------------------------------------------------------------------------------------------------------
def notes(step):
    return [line.removeprefix("  note: ") for line in str(step).splitlines() if line.startswith("  note: ")]


UNITS = (
    "parameters are gathered whole in every forward; name their blocks with value_and_grad(..., units=('blocks',)) to"
    " hold two at a time"
)
SUMS = "gradients are added over ranks by the backend: the same-bits promise is off"
ODD = "{'data': 6} is no power of two: the same bits at every run of this world, other bits in other worlds"
NOTES = [
    (dict(stage=3), []),
    (dict(stage=3, units=()), [UNITS]),
    (dict(stage=2, units=()), []),  # nothing is gathered in the forward
    (dict(stage=1, sums="backend"), [SUMS]),
    (dict(stage=3, mesh={"data": 6}), [ODD]),
    (dict(stage=3, units=(), sums="backend", mesh={"data": 6}), [UNITS, ODD, SUMS]),
]


@pytest.mark.parametrize(("how", "want"), NOTES, ids=str)
def test_a_note_stands_where_something_is_not_promised_and_nowhere_else(how, want):
    assert notes(zoo.make(**{"mesh": {"data": 4}, **how})) == want


def test_an_accumulate_that_is_no_power_of_two_is_named():
    (note,) = notes(zoo.make(1, k=3, mesh={"data": 4}))
    assert note.startswith("{'accumulate': 3} is no power of two") and "in other orders of these sums" in note


@pytest.mark.parametrize("size", [1, 4])
def test_every_part_has_a_line_and_brackets_close(size):
    chains = zoo.flat_chains(zoo.source(), 2, zoo.tx(scale=True))
    for parts, _ in chains.values():
        step = fz.train_step(*parts, mesh={"data": size})
        head, *lines = [line for line in str(step).splitlines() if not line.startswith("  note: ")]
        assert head == f"train_step on data={size} (cpu), {step.grad.env.policy}"
        assert [line.split("  -> ")[0].strip() for line in lines] == list(step.grad.names)
        assert len({line.index("->") for line in lines if "->" in line}) == 1
        depth = 0
        for name, line in zip(step.grad.names, lines, strict=True):
            depth -= name == ")"
            assert line.startswith("  " * (depth + 1) + name)
            depth += name.startswith("shard(")


def three(k):
    """Bits of two updates on this world, by stage."""
    out = []
    for stage in range(4):
        step = zoo.make(stage, k=k)
        state = step.init(zoo.params())
        for t in range(2):
            state, _ = step(state, step.local_rows(zoo.batch(t, micros=3 * k)))
        out.append(tree_hash(step.params(state)))
    return out


@pytest.mark.parametrize(("k", "kinds"), [(1, 1), (2, 2)])
def test_three_ranks_have_the_bits_that_the_note_says(k, kinds):
    """The same at every run; with micro-batches to add as well, stages 2 and 3 add ranks first and have others than 0
    and 1.
    """
    bits = simulate({"data": 3})(three, k)[0]
    assert (
        bits == simulate({"data": 3})(three, k)[0]
        and bits[0] == bits[1]
        and bits[2] == bits[3]
        and len(set(bits)) == kinds
    )
    note = (
        "  note: {'data': 3} is no power of two: the same bits at every run of this world, other bits in other worlds"
    )
    more = ", and in other orders of these sums (stages 2 and 3 against 0 and 1)"
    assert str(zoo.make(1, k=k, mesh={"data": 3})).splitlines()[-1] == note + more * (kinds - 1)


def test_once_a_state_is_there_what_is_gathered_whole_is_named_in_bytes():
    def parts(stage, units=("blocks",), **kw):
        params = {
            "in": torch.zeros(100, 8),
            "blocks": [{"w": torch.zeros(8, 8), "b": torch.zeros(8)} for _ in range(3)],
        }
        grad = fz.value_and_grad(lambda p, b: None, batch=P("data"), units=units, **kw)
        step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=stage), mesh={"data": 1}, policy="compute=bfloat16")
        state = step.init(params)
        return step, state.params.where.structure

    whole = "gathered whole in every forward are 1.6 kB: 'in' (1.6 kB)"
    step, structure = parts(3)
    how = "up to 1 MB of neighbours together, two such messages at a time"
    assert (
        notes(step) == [f"{whole}; 3 blocks of at most 144 bytes by turns, {how}"] == [gathered(step.grad, structure)]
    )
    one = "; 3 blocks of at most 144 bytes by turns, two at a time"
    assert notes(parts(3, conditional=("blocks",))[0])[0] == whole + one
    # it is said of what counts alone:
    assert [gathered(step.grad, structure, n) != "" for n in (1, 1599, 1600)] == [True, True, False]
    assert notes(parts(2)[0]) == []
    assert notes(parts(3, ())[0]) == [
        UNITS,
        (
            "gathered whole in every forward are 2.03 kB: 'in' (1.6 kB), 'blocks/0/w' (128 bytes), 'blocks/1/w' (128"
            " bytes) and 4 more"
        ),
    ]
    assert notes(parts(3, conditional=["blocks"])[0])[1:] == [
        "ranks need not run the same blocks of ['blocks']: they agree on every unit before it is gathered, and none is"
        " gathered ahead"
    ]

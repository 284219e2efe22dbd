"""Several optimizers in one place: every leaf moves as under its own alone, at every stage and world, and its state is
kept by name.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from itertools import product

import pytest
import torch
import zoo
from cover import EACH, cover
from optimizers import F64

import funczero as fz
from funczero import checkpoint, tree
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

FIRST = "embed|/w$|norm"
NAMES = [n for n, _ in tree.paths(zoo.params())]
MASK = tree.unflatten([bool(re.search(FIRST, n)) or n == "head/scale" for n in NAMES], tree.flatten(zoo.params())[1])


def momentum(b=0.9):
    """A pair of optax's form, by hand."""

    def update(grads, state, params):
        new = tree.map(lambda t, g: b * t + g, state, grads)
        return tree.map(lambda t: -0.1 * t, new), new

    return fz.lift((lambda params: tree.map(torch.zeros_like, params), update), "momentum", elementwise=True)


# (the first optimizer, the second): the first has FIRST, the second the rest
PAIRS = {
    "adamw and sgd": lambda: (fz.adamw(1e-2, weight_decay=0.1), fz.sgd(0.1, 0.9)),
    "adamw twice": lambda: (fz.adamw(1e-2), fz.adamw(fz.schedules.warmup_cosine(3e-2, 2, 8), b1=0.5)),
    "rules inside": lambda: (
        fz.adamw([("embed", 1e-3), ("", 1e-2)], weight_decay=[("w$", 0.1), ("", 0.0)]),
        fz.lion(1e-3),
    ),
    "a class of torch": lambda: (fz.from_torch("RMSprop", 1e-2), fz.adagrad(1e-2)),
    "a pair by hand": lambda: (fz.adamw(1e-2), momentum()),
}


def trained(tx, stage=3, updates=5, donate=False, dtype="float32", units=("blocks",), left=(), frozen=None):
    still = () if frozen is None else (fz.freeze(frozen),)
    parts = fz.zero(zoo.source(units=units), *still, *left, tx, stage=stage, accumulate=zoo.FEW // world_size())
    step = fz.train_step(*parts, mesh={"data": -1}, policy=dtype)
    step = fz.donate(step) if donate else step
    state, log = step.init(zoo.params(getattr(torch, dtype))), []
    for t in range(updates):
        state, m = step(state, step.local_rows(zoo.batch(t, getattr(torch, dtype))))
        log.append(m)
    return step, state, log


def masters(*args, **kw):
    step, state, _ = trained(*args, **kw)
    return dict(tree.paths(step.params(state)))


def both(name, which=FIRST):
    a, b = PAIRS[name]()
    return fz.partition([(which, a), ("", b)])


VARIANTS = {f"stage {s}": {"stage": s} for s in range(4)} | {
    "1, donated": {"stage": 1, "donate": True},
    "3, donated": {"stage": 3, "donate": True},
    "no units": {"units": ()},
}


def hashes(name, variants):
    """By stage and form: the hash of the masters."""
    return {tree_hash(masters(both(name), **VARIANTS[v])) for v in variants}


# --- the law ----------------------------------------------------------------------------------------------------------
TRIED = list(product(PAIRS, VARIANTS, (1, 2)))


@EACH
@pytest.mark.parametrize("name", PAIRS)
def test_a_partition_is_one_hash_at_every_stage_world_and_form(run_world, name, whole):
    some = TRIED if whole else cover(TRIED, pairs=[(0, 2), (1, 2)])
    ours = lambda world: [variant for pair, variant, at in some if (pair, at) == (name, world)]
    assert len({h for world in (1, 2) for h in zoo.everywhere(run_world, world, hashes, name, ours(world))}) == 1


@pytest.mark.parametrize("name", ["adamw and sgd", "rules inside", "a class of torch", "a pair by hand"])
def test_the_first_update_of_every_leaf_is_its_own_optimizers_bit_for_bit(name):
    """With the same gradients: one update from the same parameters."""
    a, b = PAIRS[name]()
    got, one, two = (masters(tx, updates=1) for tx in (both(name), a, b))
    for n in got:
        want = one if re.search(FIRST, n) or n == "head/scale" else two
        assert torch.equal(got[n], want[n]), n


def test_the_same_optimizer_twice_is_that_optimizer():
    assert tree_hash(masters(fz.partition([(FIRST, fz.adamw(1e-2)), ("", fz.adamw(1e-2))]))) == tree_hash(
        masters(fz.adamw(1e-2))
    )


def test_one_part_that_has_all_is_the_optimizer_with_its_state():
    (_, one, _), (_, other, _) = trained(fz.partition([("", fz.adamw(1e-2))])), trained(fz.adamw(1e-2))
    assert tree_hash(step_free(one)) == tree_hash(step_free(other))


def step_free(state):
    return [
        state.params.buffers,
        {k: (v.count, v.mu.buffers[: len(state.params.buffers)], v.rates) for k, v in state.chain.items()},
    ]


def test_torchs_groups_are_the_reference():
    """Two torch optimizers over their own leaves, in float64."""
    got = masters(both("adamw and sgd"), dtype="float64", updates=4)
    p = zoo.params(F64)
    unique = {id(x): (n, x.requires_grad_()) for n, x in reversed(tree.paths(p))}.values()
    kinds = [[x for n, x in unique if bool(re.search(FIRST, n)) == first] for first in (True, False)]
    optimizers = torch.optim.AdamW(kinds[0], 1e-2, weight_decay=0.1), torch.optim.SGD(kinds[1], 0.1, 0.9)
    for t in [t for t in range(4) if t != zoo.BAD]:
        loss, weight = zoo.loss_plain(p, zoo.batch(t, F64))
        leaves = [x for _, x in unique]
        for x, g in zip(leaves, torch.autograd.grad(loss / weight, leaves, allow_unused=True), strict=True):
            x.grad = torch.zeros_like(x) if g is None else g
        for o in optimizers:
            o.step()
    for n, x in tree.paths(p):
        torch.testing.assert_close(got[n], x.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "which", [FIRST, lambda path: re.search(FIRST, path) is not None, MASK], ids=["regex", "predicate", "mask"]
)
def test_a_regex_a_predicate_and_a_mask_are_one_thing(which):
    assert tree_hash(masters(both("adamw and sgd", which))) == tree_hash(masters(both("adamw and sgd")))


def test_the_first_part_that_takes_a_leaf_has_it():
    parts = [("embed", fz.sgd(0.0)), ("embed|conv", fz.sgd(0.1)), ("", fz.sgd(0.0))]
    got = masters(fz.partition(parts))
    moved = {n for n, x in tree.paths(zoo.params()) if not torch.equal(got[n], x)}
    assert moved == {"conv"}


# --- state ------------------------------------------------------------------------------------------------------------
def test_every_part_keeps_its_own_leaves_rates_and_count_by_name():
    tx = fz.partition([("embed", fz.adamw(1e-2)), ("blocks", fz.adamw(2e-2)), ("", fz.sgd(0.1, 0.9), "rest")])
    step, state, log = trained(tx)
    assert [*state.chain] == ["adamw", "adamw#2", "rest"]
    assert state.chain["adamw"].rates["lr"] == 1e-2 and state.chain["adamw#2"].rates["lr"] == 2e-2 and log[-1].lr == 0.1
    assert state.chain["adamw"].count == state.chain["rest"].count == 4  # one of five was skipped
    sizes = [
        sum(b.numel() for b in x.buffers)
        for x in (state.chain["adamw"].mu, state.chain["adamw#2"].mu, state.chain["rest"].trace)
    ]
    assert sum(sizes) == sum(b.numel() for b in state.params.buffers)  # nobody holds another's moments
    names = set(checkpoint.names.named(state).parts)
    assert (
        "adamw/mu/embed" in names
        and "adamw#2/nu/blocks/0/w" in names
        and "rest/trace/conv" in names
        and "rest/rates/momentum" in names
    )
    assert not {"adamw/mu/conv", "rest/trace/embed", "adamw/nu/blocks/0/w"} & names
    assert "adamw('embed')" in str(step) and "rest('')" in str(step)


def test_an_edit_of_one_parts_rate_moves_its_leaves_alone():
    step, state, _ = trained(both("adamw and sgd"))
    state.chain["sgd"].rates["lr"].fill_(0.0)
    after, _ = step(state, step.local_rows(zoo.batch(0)))
    pairs = zip(tree.paths(step.params(state)), tree.paths(step.params(after)), strict=True)
    assert {n for (n, x), (_, y) in pairs if not torch.equal(x, y)} == {
        n for n in NAMES if re.search(FIRST, n) or n == "head/scale"
    }


def test_a_pure_step_leaves_its_state_alone_and_a_skip_moves_nothing():
    step, state, _ = trained(both("adamw and sgd"), stage=1, updates=2)
    before = tree_hash(state._asdict())
    first, _ = step(state, step.local_rows(zoo.batch(0)))
    assert tree_hash(state._asdict()) == before and tree_hash(
        step(state, step.local_rows(zoo.batch(0)))[0]._asdict()
    ) == tree_hash(first._asdict())
    skipped, m = step(state, step.local_rows(zoo.batch(zoo.BAD)))
    assert not m.ok and tree_hash([skipped.params, skipped.chain]) == tree_hash([state.params, state.chain])


def test_a_copy_of_a_state_is_as_good():
    step, state, _ = trained(both("adamw and sgd"), stage=1)
    want = tree_hash(step(state, step.local_rows(zoo.batch(0)))[0]._asdict())
    for other in (
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        torch.utils._pytree.tree_map(lambda x: x * 1, state),
    ):
        assert tree_hash(step(other, step.local_rows(zoo.batch(0)))[0]._asdict()) == want


def test_frozen_leaves_need_no_part_and_stay():
    got = masters(
        fz.partition([("blocks", fz.adamw(1e-2)), ("embed|conv", fz.sgd(0.1))]), frozen="^(?!blocks|embed|conv)"
    )
    assert all(torch.equal(got[n], x) for n, x in tree.paths(zoo.params()) if not re.match("blocks|embed|conv", n))
    got = masters(both("adamw and sgd"), frozen="blocks/1|gain")
    assert torch.equal(got["gain"], zoo.params()["gain"]) and not torch.equal(got["embed"], zoo.params()["embed"])


def test_a_partition_that_is_not_the_last_rewrites_the_gradient():
    half, double = (
        fz.lift((lambda p: (), lambda g, s, p, k=k: (tree.map(lambda x: k * x, g), s)), n, elementwise=True)
        for k, n in ((0.5, "half"), (2.0, "double"))
    )
    got = masters(fz.sgd(0.1), left=(fz.partition([(FIRST, half), ("", double)]),), updates=1)
    want = masters(fz.sgd([(FIRST, 0.05), ("", 0.2)]), updates=1)
    assert tree_hash(got) == tree_hash(want)
    _, state, _ = trained(fz.adamw(1e-2), left=(fz.partition([(FIRST, fz.adamw(1.0)), ("", half)]),), updates=1)
    assert [*state.chain] == ["adamw", "half", "adamw#2"]


# --- checkpoints ------------------------------------------------------------------------------------------------------
def save_at(stage, directory):
    _, state, _ = trained(both("rules inside"), stage)
    step = _step(stage)
    with checkpoint.Checkpointer(directory) as ck:
        ck.save(state, 1)
    return tree_hash(step.params(step(state, step.local_rows(zoo.batch(5)))[0]))


def _step(stage, name="rules inside"):
    return fz.train_step(
        *fz.zero(zoo.source(), both(name), stage=stage, accumulate=zoo.FEW // world_size()), mesh={"data": -1}
    )


def resume_at(stages, directory):
    out = []
    for stage in stages:
        step = _step(stage)
        got = checkpoint.Checkpointer(directory).restore(like=(step, zoo.params()))
        state, _ = step(got.state, step.local_rows(zoo.batch(5)))
        out.append((tree_hash(step.params(state)), got.notes))
    return out


@pytest.mark.parametrize(("wrote", "reads"), [(1, 2), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_partition_is_restored_at_any_stage_on_any_world(run_world, tmp_path, wrote, reads):
    want = zoo.everywhere(run_world, wrote, save_at, 3, str(tmp_path))
    assert zoo.everywhere(run_world, reads, resume_at, range(4), str(tmp_path)) == [(want, ())] * 4


def test_a_pair_by_hand_in_a_partition_is_restored(tmp_path):
    _, state, _ = trained(both("a pair by hand"))
    step = _step(1, "a pair by hand")
    with checkpoint.Checkpointer(tmp_path) as ck:
        ck.save(state, 1)
    got = checkpoint.Checkpointer(tmp_path).restore(like=(step, zoo.params()))
    assert {n for n in checkpoint.names.named(got.state).parts if n.startswith("momentum/")} == {
        f"momentum/{n}" for n in NAMES if not re.search(FIRST, n) and n != "head/scale"
    }
    steps = (step, got.state), (_step(3, "a pair by hand"), state)
    assert len({tree_hash(s.params(s(x, s.local_rows(zoo.batch(5)))[0])) for s, x in steps}) == 1


# --- refusals ---------------------------------------------------------------------------------------------------------
SGD = fz.sgd(0.1)
AT_INIT = {
    "a leaf without a part": (
        [("blocks", SGD)],
        ValueError,
        (
            r"partition: no part takes parameter 'embed'; end the parts with \('', optimizer\), or freeze it:"
            r" fz.freeze\('embed'\)"
        ),
    ),
    "a regex that finds nothing": (
        [("haed", SGD), ("", SGD)],
        ValueError,
        "partition: sgd\\('haed'\\): the regex 'haed' matches no parameter; their paths begin with",
    ),
    "a predicate that finds nothing": (
        [(lambda p: False, SGD), ("", SGD)],
        ValueError,
        "partition: .* it takes no parameter; correct it",
    ),
    "a part behind one that takes its leaves": (
        [("", SGD), ("embed", SGD)],
        ValueError,
        "partition: sgd\\('embed'\\) has nothing, because a part before it takes 'embed'",
    ),
    "another tree": (
        [({"embed": True}, SGD), ("", SGD)],
        TypeError,
        "partition: the mask of sgd is no tree like the parameters",
    ),
    "a tied leaf twice": (
        [(tree.unflatten([n != "head/scale" for n in NAMES], tree.flatten(zoo.params())[1]), SGD), ("", SGD)],
        ValueError,
        "partition: the mask of sgd says two things of one tied parameter, norm = head/scale; write the same",
    ),
    "a rule of a rate that is another part's": (
        [("embed", fz.sgd([("conv", 0.1), ("", 0.2)])), ("", SGD)],
        ValueError,
        "sgd: lr: the rule 'conv' is found in no parameter's path",
    ),
    "a rate that misses a leaf of its part": (
        [("embed|conv", fz.sgd([("conv", 0.1)])), ("", SGD)],
        ValueError,
        "sgd: lr: no rule matches parameter 'embed'",
    ),
}


@pytest.mark.parametrize("kind", AT_INIT)
def test_leaves_that_do_not_have_one_optimizer_are_named_at_init(kind):
    parts, error, words = AT_INIT[kind]
    for stage in (0, 3):
        step = fz.train_step(*fz.zero(zoo.source(), fz.partition(parts), stage=stage), mesh={"data": 1})
        with pytest.raises(error, match=words):
            step.init(zoo.params())


BUILT = {
    "nothing": (lambda: fz.partition([]), "is a list, not a list of parts; write partition"),
    "a word": (lambda: fz.partition(["embed"]), "part 0 is a string; write"),
    "no optimizer": (lambda: fz.partition([("embed", 0.1)]), "part 0 has 0.1 where its optimizer stands"),
    "a factory": (lambda: fz.partition([("embed", fz.adamw)]), "part 0 has .* where its optimizer stands"),
    "a partition": (
        lambda: fz.partition([("", fz.partition([("", SGD)]))]),
        "part 0 is a partition itself; write its parts into this one",
    ),
    "no regex": (lambda: fz.partition([("(", SGD)]), r"'\(' is no regex"),
    "a name with a slash": (
        lambda: fz.partition([("", SGD, "a/b")]),
        "name='a/b' would not tell leaves of the state apart",
    ),
    "a mask of numbers": (lambda: fz.partition([({"w": 1}, SGD)]), "part 0 says .* which holds no bool at 'w'"),
}


@pytest.mark.parametrize("kind", BUILT)
def test_what_is_no_partition_is_refused_when_it_is_written(kind):
    make, words = BUILT[kind]
    with pytest.raises((TypeError, ValueError), match=f"partition: .*{words}"):
        make()


def test_an_optimizer_of_whole_leaves_is_refused_in_a_bracket_by_its_name():
    whole = fz.lift((lambda p: (), lambda g, s, p: (g, s)), "norms", elementwise=False)
    with pytest.raises(fz.ChainError, match="norms: it needs whole leaves"):
        fz.train_step(*fz.zero(zoo.source(), fz.partition([("embed", SGD), ("", whole)]), stage=1), mesh={"data": 2})
    with pytest.raises(fz.ChainError, match="sgd: the gradient is still a partial sum"):
        fz.train_step(zoo.source(), fz.partition([("", SGD)]), mesh={"data": 2})


def test_a_rate_that_is_nonsense_stops_all_parts_before_any_writes():
    step, state, _ = trained(fz.partition([(FIRST, fz.adamw(1e-2)), ("", fz.sgd(0.1))]), donate=True)
    state.chain["sgd"].rates["lr"].fill_(math.nan)
    before = tree_hash([state.params, state.chain["adamw"].mu])
    with pytest.raises(ValueError, match="sgd: in its state: lr=nan is not finite"):
        step(state, step.local_rows(zoo.batch(0)))
    assert tree_hash([state.params, state.chain["adamw"].mu]) == before

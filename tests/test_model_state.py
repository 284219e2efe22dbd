"""transforms/model_state.py: a loss with a state of its own, at every stage, world and number of micro-batches."""

from __future__ import annotations

import pytest
import torch

import funczero as fz
from funczero import P
from funczero.core.rows import split
from funczero.testing import tree_hash
from funczero.testing.simulate import simulate

ROWS, MICROS = 16, 4
RULES = [("^hidden$", "rows"), ("^seen$", "sum"), ("^peak$", lambda new, weights, old: torch.maximum(old, new.amax(0)))]
CHAINS = [(stage, world) for stage in range(4) for world in (1, 2, 4)]


def loss(params, state, batch):
    """Normalised rows; a recurrent state a row; what is seen, counted and at its highest."""
    x = batch["x"] @ params["w"]
    mean, var = x.mean(0), x.var(0)
    hidden = torch.tanh(batch["x"].sum(1) + state["hidden"] / 2)
    out = (x - mean) / (var + 1e-5).sqrt() * params["g"] + hidden[:, None] * params["g"].sum()
    new = {
        "mean": 0.9 * state["mean"] + 0.1 * mean,
        "calls": state["calls"] + 1,
        "hidden": hidden,
        "seen": state["seen"] + len(x),
        "peak": x.amax(0),
    }
    return ((out - batch["y"]) ** 2).sum(), torch.tensor(float(len(x))), new


def first():
    return {
        "mean": torch.zeros(4, dtype=torch.float64),
        "calls": torch.tensor(0),
        "hidden": torch.zeros(ROWS, dtype=torch.float64),
        "seen": torch.tensor(0),
        "peak": torch.full((4,), -torch.inf, dtype=torch.float64),
    }


def batch(t, bad=False):
    g = torch.Generator().manual_seed(t)
    x, y = (torch.randn(ROWS, n, dtype=torch.float64, generator=g) for n in (3, 4))
    return {"x": x, "y": torch.full_like(y, torch.inf) if bad else y}


def params():
    return {
        "w": torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9)),
        "g": torch.ones(4, dtype=torch.float64),
    }


def make(stage=0, world=1, stream=False, donate=False, **kw):
    source = fz.value_and_grad(loss, batch=P("data"), state=first(), rules=RULES, **kw)
    k = MICROS // world
    step = fz.train_step(*fz.zero(source, fz.sgd(0.05), stage=stage, accumulate=k), mesh={"data": -1}, policy="float64")
    return fz.donate(step) if donate else step


def trained(stage, world, **kw):
    step = make(stage, world, **kw)
    state = step.init(params())
    for t in range(3):
        state, _ = step(state, step.local_rows(batch(t)))
    return state.model_state, step.params(state)


def plain():
    """By hand: micro-batches one after another, each of the incoming state."""
    p, state = params(), first()
    for t in range(3):
        live = {n: x.requires_grad_() for n, x in p.items()}
        total, news = 0.0, []
        for i in range(MICROS):
            here = slice(i * ROWS // MICROS, (i + 1) * ROWS // MICROS)
            value, _, new = loss(
                live, {**state, "hidden": state["hidden"][here]}, {n: x[here] for n, x in batch(t).items()}
            )
            total, news = total + value, [*news, {n: x.detach() for n, x in new.items()}]
        grads = torch.autograd.grad(total / ROWS, list(live.values()))
        p = {n: (x - 0.05 * g).detach() for (n, x), g in zip(live.items(), grads, strict=True)}
        state = {
            "mean": torch.stack([n["mean"] for n in news]).mean(0),
            "calls": state["calls"] + 1,
            "hidden": torch.cat([n["hidden"] for n in news]),
            "seen": state["seen"] + ROWS,
            "peak": torch.stack([state["peak"], *(n["peak"] for n in news)]).amax(0),
        }
    return state, p


def close(found, want):
    named = fz.tree.paths(want)
    assert [n for n, _ in fz.tree.paths(found)] == [n for n, _ in named]
    for (name, x), (_, y) in zip(fz.tree.paths(found), named, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_one_hash_at_every_stage_and_world_and_the_values_of_plain_torch():
    found = {c: simulate({"data": c[1]})(trained, *c) for c in CHAINS}
    close(found[0, 1][0], plain())
    assert len({tree_hash(x) for ranks in found.values() for x in ranks}) == 1
    assert tree_hash(trained(3, 1, donate=True)) == tree_hash(found[0, 1][0])
    close(trained(3, 1, higher_order=True), plain())


def test_a_skip_keeps_the_old_and_a_look_changes_nothing():
    step = make()
    state, _ = step(step.init(params()), batch(0))
    before = tree_hash(state.model_state)
    step.grads(state, batch(1))
    after, metrics = step(state, batch(1, bad=True))
    assert not metrics.ok and tree_hash(after.model_state) == before == tree_hash(state.model_state)


def test_a_window_that_closes_early_leaves_rows_that_did_not_come():
    def run():
        source = fz.value_and_grad(loss, batch=P("data"), state=first(), rules=RULES, has_aux=False)
        step = fz.train_step(
            source,
            fz.accumulate(4, stream=True),
            fz.all_reduce("data"),
            fz.sgd(0.1),
            mesh={"data": -1},
            policy="float64",
        )
        state = step.init(params())
        rows = split(step.local_rows(batch(0)), 4, "test")
        for micro in rows[:3]:
            state, _ = step(state, micro)
        return step(state, None)[0].model_state

    alone, two = run(), simulate({"data": 2})(run)
    assert (alone["hidden"] != 0).tolist() == [True] * 12 + [False] * 4 and alone["seen"] == 12 and alone["calls"] == 1
    assert (two[0]["hidden"] != 0).tolist() == ([True] * 6 + [False] * 2) * 2 and two[0]["seen"] == 12
    assert tree_hash(two[0]) == tree_hash(two[1]) and bool(alone["mean"].isfinite().all())


def saved(folder):
    step = make(3, 2)
    state = step.init(params())
    with fz.Checkpointer(folder) as ck:
        for t in range(3):
            if t == 2:
                ck.save(state, "two")
            state, _ = step(state, step.local_rows(batch(t)))
    return tree_hash(state.model_state), tree_hash(fz.reshard(state, make(0, 2)).model_state)


def resumed(folder, stage, world):
    step = make(stage, world)
    state = fz.Checkpointer(folder).restore(like=(step, params())).state
    state, _ = step(state, step.local_rows(batch(2)))
    return tree_hash(state.model_state)


def test_a_checkpoint_goes_on_in_another_world(run_world, tmp_path):
    (want, moved), other = run_world(2, saved, tmp_path)
    assert want == moved == other[0]
    assert run_world(1, resumed, tmp_path, 0, 1) == [want]
    assert run_world(4, resumed, tmp_path, 2, 4) == [want] * 4


def test_a_state_that_is_shaped_like_the_parameters_is_no_part_of_them():
    def run():
        fn = lambda p, s, b: ((p["w"] * b["x"]).sum(), torch.tensor(float(len(b["x"]))), {"w": s["w"] + 1})
        source = fz.value_and_grad(fn, batch=P("data"), state={"w": torch.zeros(2)})
        step = fz.train_step(*fz.zero(source, fz.sgd(0.1), stage=3), mesh={"data": -1})
        state, _ = step(step.init({"w": torch.ones(4)}), {"x": torch.ones(2, 4)})
        return fz.reshard(state, step).model_state["w"].tolist()

    assert simulate({"data": 2})(run) == [[1.0, 1.0]] * 2


def test_evaluation_reads_it_and_forgets():
    step = make()
    state, _ = step(step.init(params()), batch(0))
    fn = lambda p, s, b: ((s["mean"] * p["g"]).sum() * len(b["x"]), torch.tensor(float(len(b["x"]))), s)
    with pytest.raises(TypeError, match="model state 'hidden' belongs to the rows of the training batch"):
        step.eval(fn, has_state=True)(state, batch(0))
    other = fz.train_step(fz.value_and_grad(fn, state={"mean": torch.ones(4)}), fz.sgd(0.1))
    held = other.init({"g": torch.ones(4)})
    assert other.eval(fn, has_state=True)(held, {"x": torch.ones(2, 3)}).loss == 4
    with pytest.raises(TypeError, match="eval: the loss takes a model state, but the step has none"):
        plainly = fz.train_step(fz.value_and_grad(lambda p, b: (p["g"].sum(), torch.tensor(1.0))), fz.sgd(0.1))
        plainly.eval(fn, has_state=True)(plainly.init({"g": torch.ones(4)}), {"x": torch.ones(2, 3)})


def test_it_is_printed():
    assert (
        "model state: 5 leaves of 26 values (1 by mean, 1 by first, 1 by rows, 1 by sum, 1 by a rule of its own), moved"
        " once by the 4 micro-batches of an update"
        in str(make())
    )


@pytest.mark.parametrize(
    ("state", "rules", "error", "says"),
    [
        ({"n": 3}, [], TypeError, "model state 'n' is an int; give a tree of tensors, as torch.tensor\\(3\\)"),
        ({"n": torch.ones(2)}, [("n", "max")], ValueError, "'max' is no rule of a model state; write one of"),
        ({"n": torch.ones(2)}, [("q", "sum")], ValueError, "the regex 'q' matches no leaf"),
        ({"n": torch.tensor(1)}, [("n", "mean")], ValueError, "model state 'n' is int64, which has no mean"),
        ({"n": torch.tensor(True)}, [("n", "sum")], ValueError, "model state 'n' is bool, which has no sum"),
        ({"n": torch.tensor(1.0)}, [("n", "rows")], ValueError, "model state 'n' is 0-d and has no rows"),
        (None, [("n", "rows")], ValueError, "there are rules, but no model state"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(state, rules, error, says):
    with pytest.raises(error, match=says):
        fz.value_and_grad(loss, state=state, rules=rules)


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (
            lambda s: {"n": s["n"].float()},
            "model state 'n' came back as \\(2,\\) and float32; return a tensor of shape \\(2,\\) and",
        ),
        (lambda s: {"n": s["n"][:1]}, "came back as \\(1,\\) and float64"),
        (lambda s: {"n": 1.0}, "came back as a float"),
        (lambda s: {"m": s["n"]}, "which is no tree like the one it was given"),
    ],
)
def test_what_comes_back_is_like_what_was_given(new, says):
    fn = lambda p, s, b: ((p["w"] * b).sum(), torch.tensor(1.0), new(s))
    step = fz.train_step(fz.value_and_grad(fn, state={"n": torch.ones(2, dtype=torch.float64)}), fz.sgd(0.1))
    with pytest.raises(TypeError, match=says):
        step(step.init({"w": torch.ones(2)}), torch.ones(3, 2))


def test_rows_that_are_not_the_batchs_are_told():
    fn = lambda p, s, b: ((p["w"] * b).sum(), torch.tensor(1.0), s)
    source = fz.value_and_grad(fn, state={"h": torch.ones(5)}, rules=[("h", "rows")])
    step = fz.train_step(source, fz.accumulate(2), fz.sgd(0.1))
    with pytest.raises(ValueError, match="model state 'h' has 5 rows, which do not divide by the 2 micro-batches"):
        step(step.init({"w": torch.ones(2)}), torch.ones(4, 2))


def test_ranks_that_begin_with_other_states_are_told():
    def run():
        source = fz.value_and_grad(
            loss, batch=P("data"), state={**first(), "seen": torch.tensor(torch.distributed.get_rank())}, rules=RULES
        )
        fz.train_step(*fz.zero(source, fz.sgd(0.1), stage=1), mesh={"data": -1}, policy="float64").init(params())

    with pytest.raises(RuntimeError, match="model state seen"):
        simulate({"data": 2})(run)


def test_derivatives_go_through_it():
    """Of what the second update's loss is, by parameters and by the first state."""
    step = make()
    pure, state = fz.differentiable(step), step.init(params())

    def after(values, own):
        begun = fz.with_parts(
            state._replace(chain={**state.chain, "model_state": state.chain["model_state"]._replace(values=own)}),
            values,
        )
        for t in range(2):
            begun, m = pure(begun, batch(t))
        return m.loss + begun.model_state["mean"].sum() + begun.model_state["hidden"].sum()

    own = first()
    floats, join = fz.tree.floats(own)
    found = torch.func.grad(lambda p, f: after(p, join(f)), argnums=(0, 1))(fz.parts(state), floats)
    for tree, at in ((fz.parts(state), 0), (floats, 1)):
        for name, x in tree.items():
            if name == "peak":
                continue
            along = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
            moved = lambda e, name=name, x=x, along=along, at=at: (
                after({**fz.parts(state), name: x + e * along}, own)
                if at == 0
                else after(fz.parts(state), join({**floats, name: x + e * along}))
            )
            slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
            torch.testing.assert_close((found[at][name] * along).sum(), slope, rtol=1e-6, atol=1e-7)


def test_a_state_without_leaves_is_refused():
    with pytest.raises(ValueError, match="the model state has no leaf; leave out state"):
        fz.value_and_grad(loss, batch=P("data"), state={})

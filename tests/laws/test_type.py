"""A chain is accepted if and only if it runs to the reference's value: random chains, judged by a specification of ten
lines.
"""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from zoo import everywhere

import funczero as fz
from funczero import P

AXES = ("a", "b")
WORDS = (
    "acc",
    *(f"{verb} {axis}" for verb in ("ar", "rs", "ag", "[") for axis in AXES),
    "]",
    "mean",
    "clip",
    "value",
    "sgd",
)
LR, CLIP, LIMIT, UPDATES = 0.1, 0.5, 0.05, 2


def params():
    g = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(5, 3, generator=g, dtype=torch.float64),
        "b": torch.randn(3, generator=g, dtype=torch.float64),
    }


def loss(p, b):
    return (torch.tanh(b["x"] @ p["w"] + p["b"]).square().sum(1) * b["m"]).sum(), b["m"].sum()


def batch(t, n):
    g = torch.Generator().manual_seed(t)
    return {
        "x": torch.randn(n, 5, generator=g, dtype=torch.float64),
        "m": torch.randint(0, 3, (n,), generator=g).double(),
    }


# --- words -> parts, whether they mean something, and the value they mean ---------------------------------------------
def parse(words):
    """A nested list: brackets as [axis, ...]; "grad" where the Source stands. None where brackets do not match."""
    stack = [[]]
    for w in words:
        if w.startswith("["):
            stack.append([w[2:]])
        elif w == "]":
            if len(stack) == 1:
                return None
            closed = stack.pop()
            stack[-1].append(closed)
        else:
            stack[-1].append(w)
    return stack[0] if len(stack) == 1 else None


def parts(nested):
    """The same as parts of a chain."""
    make = {
        "grad": lambda: fz.value_and_grad(loss, batch=P(AXES), units=()),
        "acc": lambda: fz.accumulate(2),
        "mean": lambda: fz.mean,
        "clip": lambda: fz.clip_by_global_norm(CLIP),
        "value": lambda: fz.clip_by_value(LIMIT),
        "sgd": lambda: fz.sgd(LR),
        "ar": fz.all_reduce,
        "rs": fz.reduce_scatter,
        "ag": fz.all_gather,
    }
    return [
        fz.shard(x[0], *parts(x[1:])) if isinstance(x, list) else make[x.split()[0]](*x.split()[1:]) for x in nested
    ]


def meaningful(words):
    """The specification: sums once an axis and before the mean, nonlinear transforms on whole sums, one update, and
    what opens closes.
    """
    n = words.index("grad") if "grad" in words else len(words)
    rest = [w[2:] for w in words[:n] if w.startswith("[")]  # brackets around the gradient: at rest
    if len(rest) < n or len(set(rest)) < n or words.count("grad") != 1:
        return False
    unreduced, opened, mean, ended, inside = set(AXES) - set(rest), [("[", a) for a in rest], False, False, set()
    left, depth = words.count("sgd"), [*range(n)]  # updates to come; brackets open here, by name
    for i, w in enumerate(words[n + 1 :], n):
        verb, axis = (*w.split(), "")[:2]
        if ended and verb != "]":  # nothing follows what rests
            return False
        if verb in ("ar", "rs", "["):
            if mean or axis not in unreduced:
                return False
            unreduced.remove(axis)
            opened += [(verb, axis)] * (verb != "ar")
            depth += [i] * (verb == "[")
        elif verb == "ag":
            if opened[-1:] != [("rs", axis)]:
                return False
            opened.pop()
        elif verb == "]":
            if not opened or opened.pop()[0] == "rs" or words[i].startswith("["):
                return False
            ended |= depth.pop() < n
        elif verb == "acc":
            if mean:
                return False
        else:
            if unreduced or verb == "mean" and mean or not left:
                return False
            mean = True
            if verb == "sgd":
                left -= 1
                inside.add(tuple(depth))
    return not left and len(inside) == 1 and not opened


def meaning(words, n):
    """The masters after two updates, unsharded, by hand."""
    p = {k: x.clone() for k, x in params().items()}
    for t in range(UPDATES):
        q = {k: x.clone().requires_grad_() for k, x in p.items()}
        total, weight = loss(q, batch(t, n))
        g = dict(zip(q, torch.autograd.grad(total / weight, list(q.values())), strict=True))
        last = max(i for i, w in enumerate(words) if w == "sgd")
        for i, w in enumerate(words):
            if w == "clip":
                norm = sum(x.square().sum() for x in g.values()).sqrt()
                g = {k: x * min(1.0, CLIP / norm.item()) for k, x in g.items()}
            elif w == "value":
                g = {k: x.clamp(-LIMIT, LIMIT) for k, x in g.items()}
            elif w == "sgd":  # an earlier one's updates are the next one's gradient
                p = {k: x - LR * g[k] for k, x in p.items()} if i == last else p
                g = {k: -LR * x for k, x in g.items()}
    return torch.cat([x.flatten() for x in p.values()])


# --- random chains ----------------------------------------------------------------------------------------------------
def random_words(rng):
    """Mostly sensible: reductions in some order and some bracketing, then nonlinear words; now and then a mutation."""
    words, open_, todo = ["grad"], [], [*AXES]
    rng.shuffle(todo)
    for axis in todo:
        words += ["acc"] * rng.randint(0, 1)
        how = rng.choice(("ar", "[", "[", "rs"))
        words.append(f"{how} {axis}")
        open_.append(axis if how in ("[", "rs") else "")
        open_[-1] = f"{how} {axis}" if open_[-1] else ""
    words += ["acc"] * rng.randint(0, 1) + rng.choices(("clip", "value", "mean", "sgd"), k=rng.randint(0, 2)) + ["sgd"]
    words += ["]" if x.startswith("[") else f"ag {x[3:]}" for x in reversed(open_) if x]
    opens = [i for i, w in enumerate(words) if w.startswith("[")]
    for i in opens[: rng.randint(0, len(opens))]:  # move opening edges left of the gradient
        if all(w.startswith("[") or w == "grad" for w in words[: words.index("grad")]) and not any(
            w.startswith(("ar", "rs")) for w in words[:i]
        ):
            words.insert(words.index("grad"), words.pop(i))
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        i = rng.randrange(len(words))
        words[i : i + rng.randint(0, 1)] = [rng.choice(WORDS)] * rng.randint(0, 1)
    return tuple(words)


def build(words, mesh):
    """The step, or None where the chain is refused."""
    try:
        return fz.train_step(*parts(parse(words)), mesh=mesh, policy="float64")
    except fz.ChainError:
        return None


def off(words, step):
    """Distance of the step's masters from what the words mean."""
    state, n = step.init(params()), 3 * step.grad.layout.stride
    for t in range(UPDATES):
        state, _ = step(state, step.local_rows(batch(t, n)))
    return (torch.cat([x.flatten() for x in step.params(state).values()]) - meaning(words, n)).abs().max().item()


@given(st.integers(0, 10**9))
@settings(max_examples=150)
def test_a_chain_is_accepted_if_and_only_if_it_means_something(seed):
    words = random_words(random.Random(seed))
    if parse(words) is None:
        return
    step, here = build(words, {"a": 2, "b": 2}), build(words, {"a": 1, "b": 1})
    assert (step is not None) == (here is not None) == meaningful(words), words
    if here is not None:
        assert off(words, here) < 1e-13, words


def sample(n):
    """Distinct chains that mean something."""
    rng, found = random.Random(0), []
    while len(found) < n:
        words = random_words(rng)
        if parse(words) is not None and words not in found and meaningful(words):
            found.append(words)
    return found


def distances(mesh):
    return {words: off(words, build(words, mesh)) for words in sample(24)}


@pytest.mark.parametrize("mesh", [{"a": 2, "b": 1}, {"a": 2, "b": 2}], ids=str)
def test_accepted_chains_run_to_their_meaning_on_many_ranks(run_world, mesh):
    found = everywhere(run_world, mesh["a"] * mesh["b"], distances, mesh)
    assert {w: d for w, d in found.items() if not d < 1e-13} == {}


def test_the_sample_is_not_dull():
    chains = sample(24)
    assert len({tuple(w for w in c if w.startswith(("[", "ar", "rs", "grad"))) for c in chains}) > 12
    assert (
        sum(c[0] == "grad" for c in chains) > 4
        and sum(c[0] != "grad" for c in chains) > 4
        and any(c.count("sgd") > 1 for c in chains)
    )

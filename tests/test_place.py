"""Places: a part of where leaves lie; views are kept where they differ, and a restore keeps them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import torch
import zoo
from cover import EACH
from layouts import CPU, structure

import funczero as fz
import funczero.testing
from funczero.layout.place import DEVICE, Device
from funczero.layout.processes import world_size
from funczero.layout.where import Where, apart
from funczero.transforms.partition import subset


@dataclass(frozen=True)
class Shelf:
    """A place of a user's own: other memory, which says when it was made."""

    def empty(self, n, dtype, device):
        """Memory here."""
        made.append(n)
        return torch.empty(n, dtype=dtype, device=device)


made = []  # by this process's shelves
SHELF = Shelf()


def test_a_place_is_part_of_where():
    own = structure({"w": torch.ones(4, 3)}).structure
    here, there = Where(own, (("data", 2, 0),)), Where(own, (("data", 2, 0),), SHELF)
    assert here.place == DEVICE == Device() and here != there and here == Where(own, here.coords)
    assert there.inner("local", 2, 1).place == there.outer.place == SHELF and there.inner("local", 2, 1).outer == there
    assert Where.whole(own) is Where.whole(own) and Where.whole(own, SHELF) is Where.whole(own, SHELF) != Where.whole(
        own
    )
    assert pickle.loads(pickle.dumps(there)) == copy.deepcopy(there) == there


def test_a_subset_of_leaves_lies_where_all_of_them_do():
    own = structure({"w": torch.ones(4, 3), "v": torch.ones(2)}).structure
    assert subset(Where(own, (), SHELF), (0,)).place == SHELF


def test_views_are_kept_where_coordinates_or_place_differ():
    own = structure({"w": torch.ones(4, 3)}).structure
    rest, masters = Where(own, ()), Where(own, (("data", 2, 0),))
    assert apart(rest, rest) is None and apart(masters, rest) is rest
    assert apart(Where(own, (), SHELF), rest) is rest and apart(Where(own, (), SHELF), Where(own, (), SHELF)) is None


def test_values_move_and_stay_the_same():
    x = structure(zoo.params(), ("blocks",)).at((), torch.float32)
    made.clear()
    y = x.placed(SHELF, CPU)
    assert made == [b.numel() for b in x.buffers] and y.where == Where(x.where.structure, (), SHELF)
    assert all(
        torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        for a, b in zip(x.buffers, y.buffers, strict=True)
        if a.numel()
    )
    assert x.placed(DEVICE, CPU) is x and y.placed(SHELF, CPU) is y and y.placed(DEVICE, CPU).where == x.where


def on_the_shelf(g):
    """A transform of a user's own around the optimizer: its masters lie elsewhere between updates."""

    def init(params):
        state = g.init(params)
        return {**state, "params": state["params"].placed(SHELF, params.device)}

    def apply(views, state, batch, seed):
        out, new = g.apply(views, {**state, "params": state["params"].placed(DEVICE, batch["x"].device)}, batch, seed)
        return out, {**new, "params": new["params"].placed(SHELF, batch["x"].device)}

    return g._replace(init=init, apply=apply)


def trained(stage, shelf, folder):
    """Three updates with masters here or there, restored before the last: where states lie, bits, a loss."""
    parts = fz.zero(
        zoo.source(units=()), *zoo.tx(), *[on_the_shelf] * shelf, stage=stage, accumulate=zoo.MICROS // world_size()
    )
    step = fz.train_step(*parts, mesh={"data": -1}, policy="compute=bfloat16")
    state = step.init(zoo.params())
    for t in range(2):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    saver = fz.Checkpointer(folder, step=step)
    saver.save(state, 2)
    saver.wait()
    made.clear()
    backs = [saver.restore(2, like=like).state for like in (state, (step, zoo.params()))]
    kept = [b.params.where == state.params.where and (b.views is None) == (state.views is None) for b in backs]
    saver.close()
    lies = state.params.where.place, None if state.views is None else state.views.where.place, bool(made)
    ends = [fz.testing.tree_hash(step.params(step(b, step.local_rows(zoo.batch(2)))[0])) for b in (state, *backs)]
    changed = state._replace(params=state.params.map(lambda b: b * 0.5))
    loss = step.eval(zoo.loss_plain)(
        changed, step.local_rows(zoo.batch(2))
    ).loss.item()  # views are made anew of these masters
    return lies, all(kept), len(set(ends)), ends[0], loss


@EACH
def test_a_step_whose_masters_lie_elsewhere(run_world, tmp_path, whole):
    """The same bits, kept views, and a restore that keeps the place.

    At stages 0 and 3 there would be no views without it.
    """
    for world in (1, 2):
        for stage in {1: (0, 3), 2: (1, 3)}[world] if whole else {1: (0,), 2: (1,)}[world]:
            found = [
                zoo.everywhere(run_world, world, trained, stage, shelf, str(tmp_path / f"{world}{stage}{shelf}"))
                for shelf in (False, True)
            ]
            (here, kept, same, bits, loss), (there, kept_, same_, bits_, loss_) = found
            assert here == (DEVICE, DEVICE if (stage, world) == (1, 2) else None, False) and there == (
                SHELF,
                DEVICE,
                True,
            )
            assert kept and kept_ and same == same_ == 1 and bits == bits_ and loss == loss_


def test_a_state_of_another_place_is_refused():
    step, other = (
        fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), *shelf, stage=3), mesh={"data": -1})
        for shelf in ((), (on_the_shelf,))
    )
    cut = "cut (part 1 of 1 over 'data')"
    what = f"its parameters lie {cut}, in Shelf(), but this step's lie {cut}; begin with"
    words = f"step: this state is not one of this step: {what}"
    try:
        step.params(other.init(zoo.params()))
    except ValueError as e:
        assert str(e).startswith(words)
    else:
        raise AssertionError("it was taken")

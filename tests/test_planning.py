"""What is said of a plan: the search, the verbs, the picture, the command, seconds; and what cannot be planned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo

import funczero as fz
from funczero import P
from funczero.cli import main
from funczero.planning.model import Link, Machine, links_of, machine_of, seconds_of
from funczero.planning.trace import Verb

META = torch.device("meta")


def step(stage=3, loss=zoo.loss_plain, units=("blocks",), mesh=None, **kw):
    grad = fz.value_and_grad(loss, batch=P("data"), units=units, **kw)
    return fz.train_step(*fz.zero(grad, fz.adamw(1e-2), stage=stage), mesh=mesh or {"data": 1})


def linear(p, b):
    return F.mse_loss(b["x"] @ p["w"], b["y"], reduction="sum"), b["x"].new_tensor(float(len(b["x"])))


# --- seconds
def test_a_message_is_hidden_by_what_is_computed_until_it_is_awaited():
    links, machine = {"data": Link(latency=1.0, speed=1e3)}, Machine(flops=1.0)
    send, wait = Verb("gather", "data", nbytes=1000), Verb("wait", "data", of=0)
    work = lambda flops: Verb("compute", flops=flops, operations=1)
    at_once = seconds_of([send, wait, work(5)], links, machine)
    assert (at_once.update, at_once.messages, at_once.waited) == (7.0, {"data": 2.0}, {"data": 2.0})
    behind = seconds_of([send, work(5), wait], links, machine)
    assert (behind.update, behind.waited) == (5.0, {"data": 0.0})
    two = seconds_of([send, send, Verb("wait", "data", of=1)], links, machine)
    assert two.update == 4.0  # one link carries one message after another


def test_links_and_arithmetic_are_read_from_text():
    found = links_of("node=100Gbit/10us,local=400Gbit/2us", {"node": 2, "local": 4})
    assert found == {"node": Link(1e-5, 12.5e9), "local": Link(2e-6, 50e9)}
    assert machine_of("3e12") == Machine(3e12) and machine_of("1T,20GB") == Machine(1e12, 2e10)
    assert machine_of("5ms") == Machine(operation=5e-3) and machine_of("2TB,5us,300T") == Machine(3e14, 2e12, 5e-6)
    for odd in ("1T,2T", "1T,2TB,3GB", "0T", "1.2.3T", "5us,3ms", "1T,"):
        with pytest.raises(ValueError, match="is no arithmetic"):
            machine_of(odd)


def test_a_faster_link_takes_less_and_an_exact_sum_of_what_is_computed_stays():
    batch = {"x": torch.empty(64, 32, device=META), "y": torch.empty(64, 16, device=META)}
    at = lambda link: fz.plan(step(1, linear, ()), {"w": torch.empty(32, 16)}, batch, {"data": 8}, link, "1G").seconds
    slow, fast = at("data=1Mbit/1ms"), at("data=1Gbit/1us")
    assert slow.update > fast.update and slow.compute == fast.compute > 0


# --- what is printed
def test_verbs_follow_one_another_as_the_step_makes_them():
    words = str(fz.explain(step(), zoo.params(), zoo.batch(0, micros=2), {"data": 2}))
    lines = [line.split() for line in words.splitlines()[1:]]
    verbs = [(line[0], line[2]) for line in lines if line[0] in ("gather", "reduce_scatter")]
    assert verbs[:3] == [("gather", "the"), ("gather", "blocks/0"), ("gather", "blocks/1")]
    assert verbs[-1][0] == "reduce_scatter" and "backward" in words and "all_reduce" in words
    assert "['data'] -> whole" in words and "sum of whole -> ['data']" in words


def test_who_holds_what_is_drawn():
    drawn = fz.visualize({"w": P("data"), "b": P(), "v": P(None, ("node", "data"))}, {"node": 2, "data": 2})
    assert drawn.parts == (((0, 2), (1, 2), (0, 2), (1, 2)), ((0, 1),) * 4, ((0, 4), (1, 4), (2, 4), (3, 4)))
    lines = str(drawn).splitlines()
    assert len(lines) == 4 and lines[1].split()[-1] == "·█" and "████" in lines[2]
    svg = drawn.svg()
    assert svg.startswith("<svg") and svg.count("<rect") == 2 * 3 * 4 and "P('data')" not in svg
    wide = fz.visualize({"w": P("data")}, {"data": 1024})
    assert str(wide).endswith("and 1008 ranks more, alike")
    with pytest.raises(ValueError, match="which the mesh {'x': 2} has not"):
        fz.visualize({"w": P("data")}, {"x": 2})


def test_a_search_ranks_what_fits_before_what_does_not():
    batch = {"x": torch.empty(64, 256, device=META), "y": torch.empty(64, 512, device=META)}
    grad = fz.value_and_grad(linear, batch=P(("node", "local")))
    found = fz.search_plans(
        grad, fz.adamw(1e-3), params={"w": torch.empty(256, 512)}, mesh={"node": 2, "local": 4}, batch=batch,
        memory="2.4MB", link="node=1Gbit/50us,local=10Gbit/5us", wires=("exact",), accumulate=(1, 3),
    )  # fmt: skip
    fits = [row.fits for row in found.rows]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    names = [row.candidate.name for row in found.rows]
    assert set(names) == {"ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "MiCS", "hpZ"}  # 64 rows do not divide by 3
    took = [row.plan.seconds.update for row in found.rows if row.fits]
    assert len(found.left_out) == 6 and all("accumulate 3" in line and "divide" in line for line in found.left_out)
    assert took == sorted(took) and found.best is found.rows[0].plan and "fits" in str(found)


class Shape:  # as jax.ShapeDtypeStruct
    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype


def test_a_plan_needs_shapes_alone():
    batch = {"x": torch.empty(8, 32), "y": torch.empty(8, 16)}
    made = step(1, linear, ())
    with pytest.raises(ValueError, match=r"the step has no state yet.*write plan\(step, params\)"):
        fz.plan(made)
    whole = {"w": torch.zeros(32, 16)}
    want = fz.plan(made, whole, batch)
    shapes = {name: Shape(tuple(x.shape), "float32") for name, x in batch.items()}
    assert fz.plan(made, {"w": Shape((32, 16), torch.float32)}, shapes)[:-1] == want[:-1]
    made.init(whole)
    assert fz.plan(made, batch=batch)[:-1] == want[:-1]  # those of the state
    linear_module = torch.nn.Linear(32, 16, device=META)
    loss_fn, _ = fz.stateless(linear_module, lambda model, b: (model(b["x"]).sum(), torch.tensor(float(len(b["x"])))))
    assert fz.plan(step(1, loss_fn, ()), linear_module, batch).parameters == 32 * 16 + 16


def test_a_plan_of_a_captured_step_says_whose_peak_it_is():
    batch = {"x": torch.empty(8, 32), "y": torch.empty(8, 16)}
    made, whole = step(1, linear, ()), {"w": torch.empty(32, 16)}
    want, found = fz.plan(made, whole, batch), fz.plan(fz.compile(made), whole, batch)
    assert found.memory == want.memory and not want.notes and "what fz.compile keeps may be more" in str(found)


# --- the command
def test_the_command_plans_a_file(capsys):
    assert main(["plan", "funczero.testing.example", "--mesh=data=4", "--rows=3", "--explain"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("plan on data=4, rank 0: ") and "reduce_scatter" in said and "peak" in said
    assert main(["plan", "funczero.testing.example", "--mesh=data=4", "--rows=3", "--memory=1kB"]) == 1
    assert "is over 1kB" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_plans_a_config_of_hugging_face(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32).save_pretrained(tmp_path)
    line = ["plan", str(tmp_path), "--mesh=node=2,local=2", "--length=16", "--rows=2"]
    assert main([*line, "--link=node=1Gbit/50us,local=10Gbit/5us", "--flops=1T"]) == 0
    assert "an update: compute" in capsys.readouterr().out
    page = tmp_path / "ds_config.json"
    page.write_text(
        '{"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},'
        ' "zero_optimization": {"stage": 2}}'
    )
    assert main(["plan", str(tmp_path), "--mesh=data=4", "--length=16", "--rows=2", f"--ds_config={page}"]) == 0
    assert main([*line, "--search", "--memory=1GB", "--no_batch"]) == 0
    assert "hpZ" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--length=33"]) == 2
    assert "--length=33, but the config has 32 positions" in capsys.readouterr().err
    assert main(["plan", str(tmp_path)]) == 0 and capsys.readouterr().out
    ds = ["plan", str(tmp_path), "--length=16", f"--ds_config={page}"]
    own, wide = (("--mesh=data=4",), ("--mesh=data=4", "--rows=2"))
    said = []
    for more in (own, wide):  # a micro-batch has the config's rows
        assert main([*ds, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    for more, why in (
        (["--mesh=data=4", "--rows=1"], "a micro-batch of"),
        (["--mesh=data=4", "--stage=1"], "--stage would change nothing here, because the ds_config.json says its own"),
        (["--search"], "--ds_config would change nothing here"),
    ):
        assert main([*ds, *more]) == 2 and why in capsys.readouterr().err
    page.write_text(page.read_text().replace('"stage": 2', '"stage": 3, "zero_hpz_partition_size": 4'))
    assert main([*ds, "--mesh=node=4,local=2"]) == 2
    assert "write --mesh=node=2,local=4" in capsys.readouterr().err


BAD = {
    "mesh": (["--mesh=8"], "is no mesh; write its axes and sizes, as node=8,local=8"),
    "link": (["--mesh=data=2", "--link=data=fast"], "is no link; write axis=rate/latency"),
    "a link of no axis": (["--mesh=data=2", "--link=node=1Gbit/1us"], "which is no axis of the mesh"),
    "memory": (["--memory=much"], "is no size; write 24GiB"),
    "flops": (["--flops=many"], "is no arithmetic; write 10T"),
    "rank": (["--mesh=data=2", "--rank=2"], "is not on a mesh of 2 ranks"),
    "another axis": (["--mesh=node=2"], "has other axes than the step"),
    "arithmetic without links": (["--mesh=data=2", "--flops=1T"], "--link says nothing of the axis 'data'"),
    "a link twice": (["--mesh=data=2", "--link=data=1Gbit/1us,data=2Gbit/1us"], "has two links of 'data'"),
    "rows": (["--rows=0"], "--rows=0 is below 1"),
    "a config's policy": (["--policy=compute=bfloat16"], "--policy would change nothing here"),
    "a stage to search": (["--search", "--stage=0"], "--stage would change nothing here"),
    "verbs of a search": (["--search", "--explain"], "--explain would change nothing here"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_written_wrong_is_one_sentence(what, capsys):
    words, why = BAD[what]
    assert main(["plan", "funczero.testing.example", *words]) == 2
    said = capsys.readouterr().err
    assert why in said and len(said.splitlines()) == 1


def test_what_is_named_is_found_or_refused(capsys):
    for what, why in (("no.such.module", "there is no module 'no.such.module'"), ("none.py", "there is no file")):
        assert main(["plan", what]) == 2
        said = capsys.readouterr().err
        assert why in said and len(said.splitlines()) == 1


# --- what cannot be planned
def reads(p, b):
    loss, weight = linear(p, b)
    return (loss * 2 if loss > 1 else loss), weight


def selects(p, b):
    loss, weight = linear(p, {"x": b["x"][b["x"][:, 0] > 0], "y": b["y"][:1]})
    return loss, weight


def constant(p, b):
    loss, weight = linear(p, b)
    return loss * (2 if torch.tensor(3) > 1 else 1), weight


def test_what_a_constant_says_is_known():
    batch = {"x": torch.empty(4, 3), "y": torch.empty(4, 2)}
    assert fz.plan(step(1, constant, ()), {"w": torch.empty(3, 2)}, batch).flops > 0


@pytest.mark.parametrize("loss", [reads, selects])
def test_a_loss_that_reads_values_is_refused_with_its_place(loss):
    batch = {"x": torch.empty(4, 3), "y": torch.empty(4, 2)}
    with pytest.raises(TypeError, match=rf"plan: the loss \(.*test_planning.py:\d+, in {loss.__name__}\)"):
        fz.plan(step(1, loss, ()), {"w": torch.empty(3, 2)}, batch)


def test_routed_blocks_and_other_meshes_are_refused_by_name():
    routed = step(3, conditional=("blocks",))
    with pytest.raises(ValueError, match=r"which blocks of \['blocks'\] a rank opens hangs on its rows"):
        fz.plan(routed, zoo.params(), mesh={"data": 2})
    with pytest.raises(ValueError, match="an update sends more for has_aux, unused of its loss"):
        fz.plan(step(1, has_aux=True, unused="keep"), zoo.params(), mesh={"data": 2})
    with pytest.raises(ValueError, match="does not divide"):
        fz.plan(step(), zoo.params(), zoo.batch(0, micros=1), mesh={"data": 4})


def test_arguments_that_are_none_are_refused_by_name():
    batch, params = {"x": torch.empty(8, 32), "y": torch.empty(8, 16)}, {"w": torch.empty(32, 16)}
    at = lambda **kw: fz.plan(step(1, linear, ()), params, batch, **{"mesh": {"data": 4}, **kw})
    search = lambda **kw: fz.search_plans(
        fz.value_and_grad(linear, batch=P("data")),
        fz.adamw(1e-3),
        params=params,
        batch=batch,
        **{"mesh": {"data": 4}, **kw},
    )
    drawn = lambda mesh: lambda: fz.visualize({"w": P("data")}, mesh)
    for fn, why in (
        (lambda: at(link=Link()), "is no link of an axis"),
        (lambda: at(link="data=1Gbit/1us", machine=5.0), "machine=5.0 is no machine"),
        (lambda: at(link="data=1Gbit/1us", machine=Machine(-1.0)), "machine: flops=-1.0 is below 0"),
        (lambda: at(rank=True), "rank=True is not on a mesh"),
        (lambda: search(memory=0), "search_plans: memory=0 is not above 0"),
        (lambda: search(accumulate=2), "accumulate=2 are no numbers"),
        (lambda: search(mesh={}), "the mesh has no axis"),
        (drawn({"data": 0}), "mesh axis 'data'=0 is below 1"),
        (drawn({"data": 2.0}), "is a float and no whole number"),
        (drawn(8), "mesh=8 is no dict of sizes"),
    ):
        with pytest.raises((TypeError, ValueError), match=why):
            fn()


def test_ranks_are_numbered_by_the_steps_own_order_of_axes():
    grad = fz.value_and_grad(linear, batch=P(("node", "local")))
    made = fz.train_step(*fz.zero(grad, fz.adamw(1e-3), stage=1, axis=("node", "local")), mesh={"node": 1, "local": 1})
    assert fz.plan(made, {"w": torch.empty(32, 16)}, mesh={"local": 2, "node": 4}).mesh == {"node": 4, "local": 2}


def test_a_search_shows_the_rank_that_holds_most():
    """The first rank has the dearest leaf, the second the two others, which take more."""
    loss = lambda p, x: (sum((x @ w).square().sum() for w in p.values()), torch.tensor(float(len(x))))
    params = {"a": torch.empty(64, 40), "b": torch.empty(64, 36), "c": torch.empty(64, 36)}
    found = fz.search_plans(
        fz.value_and_grad(loss, batch=P("data")), fz.soap(1e-3), params=params, mesh={"data": 2},
        batch=torch.empty(4, 64), wires=("exact",),
    )  # fmt: skip
    assert {row.candidate.name: row.plan.rank for row in found.rows}["ZeRO-3"] == 1
    assert "that hold most, [1]" in str(found)


def test_norms_of_leaves_are_planned():
    """The bins of small leaves are numbers, which keep their values in a plan, and are sent to nobody."""
    grad = fz.value_and_grad(linear, batch=P("data"))
    made = fz.train_step(*fz.zero(grad, fz.lamb(1e-3), stage=3), mesh={"data": 1})
    found = fz.plan(made, {"w": torch.empty(3, 2)}, {"x": torch.empty(4, 3), "y": torch.empty(4, 2)}, mesh={"data": 2})
    assert found.sent["data", "all_reduce", "int64"] > 0

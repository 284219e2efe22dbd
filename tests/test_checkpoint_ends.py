"""However a process ends, what `save` took is on disk, or its exit code and one sentence say that it is not; whoever
holds the store leaves last; nobody is alone by mistake.
"""

from __future__ import annotations

import re
from pathlib import Path

import checkpoints
import pytest
from cover import EACH

from funczero.checkpoint import Checkpointer, folder, manifest

README = Path(__file__).parent.parent / "README.md"
STARTED = """
import os, signal, sys, time
import checkpoints, zoo
import funczero as fz
SIZE, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
step = checkpoints.make("3 [grad acc", SIZE, check=0)
state = checkpoints.train(step, step.init(zoo.params(), key=7), 0, 1)
def slow(point):
    if point == "made":
        time.sleep(0.7)
"""
SAVED = STARTED + """
ck = fz.Checkpointer({directory!r}, step=step, passing=slow)
ck.save(state, 1)
"""
WITH = STARTED + """
with fz.Checkpointer({directory!r}, step=step, passing=slow) as ck:
    ck.save(state, 1)
    {inside}
"""
ENDS = {  # how, what follows a save, and the exit code
    "the end of the script": (SAVED, 0),
    "sys.exit(0)": (SAVED + "sys.exit(0)", 0),
    "sys.exit(3)": (SAVED + "sys.exit(3)", 3),
    "an exception": (SAVED + "raise ValueError('mine')", 1),
    "an exception inside with": (WITH.replace("{inside}", "raise ValueError('mine')"), 1),
    "sys.exit inside with": (WITH.replace("{inside}", "sys.exit(4)"), 4),
    "ctrl-c": (SAVED + "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -2),
    "nobody holds it": (STARTED + "fz.Checkpointer({directory!r}, step=step, passing=slow).save(state, 1)", 0),
    "an exception on one rank": (SAVED + "if RANK == SIZE - 1: raise ValueError('mine')", None),
    "a child of multiprocessing": (STARTED + """
import multiprocessing
def child():
    fz.Checkpointer({directory!r}, step=step, passing=slow).save(state, 1)
if SIZE == 1:
    p = multiprocessing.get_context("fork").Process(target=child)
    p.start(); p.join(); sys.exit(p.exitcode)
child()
""", 0),
}  # fmt: skip


FEW = "sys.exit(3)", "ctrl-c", "nobody holds it", "an exception on one rank"


@EACH
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_save_took_is_there_however_the_process_ends(ends, tmp_path, size, whole):
    """Also where each rank is killed by nothing but its own end, and rank 0, which holds the store, ends first."""
    some = {how: way for how, way in ENDS.items() if whole or how in FEW}
    for i, (script, _) in enumerate(some.values()):
        ends.start(tmp_path / str(i), script.replace("{directory!r}", repr(str(tmp_path / str(i) / "run"))), size)
    like = (checkpoints.make("3 [grad acc", 1), checkpoints.abstract())
    for i, (how, (_, code)) in enumerate(some.items()):
        told = ends.told(tmp_path / str(i))
        assert (
            all(t["code"] == code for t in told)
            or code is None
            and told[-1]["code"] == 1
            and all(t["code"] == 0 for t in told[:-1])
        ), (how, told)
        assert "lost" not in told[0]["err"] and all(
            ("ValueError: mine" in t["err"]) == (t["code"] == 1) for t in told
        ), (how, told)
        (found,) = folder.listing(tmp_path / str(i) / "run").entries
        assert not manifest.check_files(found.path, found.manifest, strangers=True)
        assert Checkpointer(tmp_path / str(i) / "run").restore(like=like).step == 1


FULL = """
def slow(point):
    if point == "made":
        time.sleep(0.3)
        if RANK == SIZE - 1:
            raise OSError(28, "No space left on device")
"""


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_is_lost_is_said_by_one_sentence_and_the_exit_code(ends, tmp_path, size):
    scripts = {
        "end": SAVED,
        "sys.exit(0)": SAVED + "sys.exit(0)",
        "later": SAVED + "time.sleep(1.5)",
        "with": WITH.replace("{inside}", "raise ValueError('mine')"),
        "child": ENDS["a child of multiprocessing"][0],
    }
    for how, script in scripts.items():
        ends.start(
            tmp_path / how,
            script.replace(STARTED, STARTED + FULL).replace("{directory!r}", repr(str(tmp_path / how / "run"))),
            size,
        )
    for how in scripts:
        for t in ends.told(tmp_path / how):
            assert t["code"] == 1, (how, t)
            if how == "with":
                assert "ValueError: mine" in t["err"] and "besides, " in t["err"] and "No space left" in t["err"]
            else:
                assert (
                    t["err"].count("funczero: save '1' is lost, though this process ends") == 1
                    and "No space left" in t["err"]
                ), (how, t)
        assert not folder.listing(tmp_path / how / "run").entries


LATE = STARTED + """
last = False
def late(point):  # rank 1 is slow to hear the last word
    if last and point == "awaits" and RANK == 1:
        time.sleep(2.0)
ck = fz.Checkpointer({directory!r}, step=step, passing=late)
ck.save(state, 1)
ck.wait()
last = True
"""
ASKED = """
def more():
    checkpoints.train(step, state, 1, 2)
    time.sleep(0.3 * RANK)
    return {ask}
while not more():
    pass
"""
LAST = {  # the last thing that a script does; but for the last two, rank 1 hears rank 0's word late
    "save and wait": "ck.save(state, 2); ck.wait()",
    "restore": "ck.restore(like=state)",
    "names": "assert ck.names() == ['1']",
    "poll": "last = False\nck.save(state, 2)" + ASKED.replace("{ask}", "ck.poll()"),
    "notice": (
        "n = fz.checkpoint.Notice()\nif RANK == 0: os.kill(os.getpid(), signal.SIGUSR1)"
        + ASKED.replace("{ask}", "n.given()")
    ),
}


@EACH
def test_the_one_who_holds_the_store_leaves_last(ends, tmp_path, whole):
    some = {how: last for how, last in LAST.items() if whole or how in ("save and wait", "restore", "notice")}
    for i, last in enumerate(some.values()):
        script = LATE.replace("{directory!r}", repr(str(tmp_path / str(i) / "run"))) + last
        ends.start(tmp_path / str(i), script, 2)
    for i, how in enumerate(some):
        told = ends.told(tmp_path / str(i))
        said = [line for t in told for line in t["err"].splitlines() if "the loss did not use" not in line]
        assert [t["code"] for t in told] == [0, 0] and said == [], (how, told)


@pytest.mark.slow
def test_the_readme_resumes_under_torchrun(ends, tmp_path):
    """Its lines as they stand: a first run saves, a second one restores before anything has joined the world, and saves
    again.
    """
    first, *_, lines = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[:6]
    built, trained = first.split("state = step.init(params)")
    saves, restores = [next(x for x in lines.splitlines() if f".{verb}(" in x) for verb in ("save", "restore")]
    opened, after = lines.splitlines()[0], lines.splitlines()[-1]
    go = f"import os\nos.chdir({str(tmp_path)!r})\n" + built
    one = ends.run(tmp_path / "one", go + "state = step.init(params)" + trained + f"\n{opened}\n{saves}\n", 2)
    assert [t["code"] for t in one] == [0, 0], one
    again = (
        f"\n{opened}\n{restores}\n    {after}\n    state, _ = step(state,"
        f" step.local_rows(batch))\n{saves}\nprint(int(state.step), note)\n"
    )
    two = ends.run(tmp_path / "two", go + again, 2)
    assert [(t["code"], t["out"]) for t in two] == [(0, "101 (1, 2)\n")] * 2, two
    found = folder.listing(tmp_path / "run" / "checkpoints")
    assert [(e.path.name, e.manifest.world) for e in found.entries] == [("100", 2), ("101", 2)] and not (
        found.damaged or found.half
    )
    for e in found.entries:
        assert not manifest.check_files(e.path, e.manifest, strangers=True)


ALONE = """
import checkpoints
import funczero as fz
from funczero.checkpoint import Checkpointer
step = checkpoints.make("3 [grad acc", 2, check=0)
ck = Checkpointer({directory!r}, {step})
{call}
print(ck._peers.size)
"""


@pytest.mark.slow
def test_peers_are_counted_when_the_world_has_been_joined(ends, tmp_path):
    """By every call that has a step to join through; a tool that inherits RANK joins nothing."""
    calls = {
        "restore": ("", "ck.restore(like=(step, checkpoints.abstract()))"),
        "names": ("step=step", "ck.names()"),
        "tool": ("", "ck.names()"),
        "later": ("", "ck.names(); ck.restore(like=(step, checkpoints.abstract())); ck.names()"),
    }
    told = ends.run(tmp_path / "saved", (SAVED + "ck.wait()").replace("{directory!r}", repr(str(tmp_path / "run"))), 2)
    assert [t["code"] for t in told] == [0, 0], told
    for how, (step, call) in calls.items():
        ends.start(tmp_path / how, ALONE.format(directory=str(tmp_path / "run"), step=step, call=call), 2)
    for how in calls:
        told = ends.told(tmp_path / how)
        assert [(t["code"], t["out"]) for t in told] == [(0, "1\n" if how == "tool" else "2\n")] * 2, (how, told)

"""Ranks that go apart are told so, all of them, within seconds; ranks that do not are left alone.

Every case is a script, run as real processes to the end of their interpreters.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

SAID = re.compile(
    r"(?:\[rank\d+\]: )?funczero(?:\.world\.ledger\.DivergenceError)?: (.*)"
)  # by the thread, or as the exception of the main one
LIMIT = 10.0  # seconds from going apart to the end of every process

PRELUDE = '''
import os, sys, time
import torch
import funczero as fz
from funczero import P

torch.set_num_threads(1)
RANK = int(os.environ["RANK"])
bad = slow = 0

def loss_fn(params, batch):
    if bad:
        raise ValueError("bad sample 17")
    time.sleep(slow)
    out = torch.tanh(batch["x"] @ params["w1"]) @ params["w2"]
    return (out - batch["y"]).square().sum(), torch.tensor(float(len(out)))

def make(stage=3, accumulate=2, **kw):
    grad = fz.value_and_grad(loss_fn, batch=P("data"))
    tx = fz.clip_by_global_norm(1.0), fz.adamw(1e-2)
    return fz.train_step(*fz.zero(grad, *tx, stage=stage, accumulate=accumulate), mesh={"data": -1}, **kw)

def apart():
    print("apart", time.time(), flush=True)

g = torch.Generator().manual_seed(0)
params = {"w1": torch.randn(8, 16, generator=g), "w2": torch.randn(16, 4, generator=g)}
rows = {"x": torch.randn(24, 8, generator=g), "y": torch.randn(24, 4, generator=g)}
'''


class End(NamedTuple):
    """How a rank ended: its exit code, what it wrote, and when (seconds since the epoch)."""

    code: int
    out: str
    err: str
    when: float


@pytest.fixture(scope="module")
def start(ends):
    """`start(folder, text, size=2)`: the script as so many processes, each until its own end."""
    return lambda folder, text, size=2: [
        End(t["code"], t["out"], t["err"], t["when"]) for t in ends.run(folder, PRELUDE + text, size)
    ]


def told(ends):
    """The one message of all ranks, each of which ended with an error and in time."""
    went = max(float(e.out.split("apart ")[1].split()[0]) for e in ends if "apart " in e.out)
    assert [e.code for e in ends] == [1] * len(ends), ends
    assert all(e.when - went < LIMIT for e in ends), [e.when - went for e in ends]
    lines = [
        [m.group(1).split(" (this rank is at ")[0] for line in e.err.splitlines() if (m := SAID.match(line))]
        for e in ends
    ]
    assert all(line == lines[0] and len(line) == 1 for line in lines), (lines, ends)
    assert all("terminate called" not in e.err for e in ends), ends
    return lines[0][0]


def test_one_evaluation_more_on_one_rank(start, tmp_path):
    ends = start(tmp_path, """
step = make(stage=1, accumulate=1)
state = step.init(params)
for t in range(6):
    if t == 3 and RANK == 1:
        apart()
        step.eval(loss_fn)(state, step.local_rows(rows))
    state, m = step(state, step.local_rows(rows))
""", size=3)  # fmt: skip
    message = told(ends)
    assert re.match(
        r"rank 1 launched all_reduce over 'data' of \d+ bytes of int64 in step.eval with 8 rows at step 3, ", message
    ), message
    assert re.search(
        r", while ranks 0, 2 launched reduce_scatter over 'data' of \d+ bytes of float32 in step\(state, batch\) with 8"
        r" rows at step 3; ",
        message,
    ), message
    assert message.endswith("; every rank must make the same calls: step.eval on all ranks or on none"), message
    assert all(
        re.search(r" \(this rank is at .*script.py:\d+\)\n$", e.err) for e in ends if "Error" not in e.err
    )  # unless gloo broke the wait first


def test_one_batch_fewer_on_one_rank(start, tmp_path):
    message = told(start(tmp_path, """
step = make()
state = step.init(params)
for t in range(3 + (RANK == 0)):
    state, m = step(state, step.local_rows(rows))
apart()
"""))  # fmt: skip
    assert re.match(
        r"rank 1 left after step 2, while rank 0 launched all_gather over 'data' of \d+ bytes of float32 in"
        r" step\(state, batch\) with 12 rows at step 3; ",
        message,
    ), message
    assert message.endswith(
        "every rank must make as many calls of step(state, batch): give every rank as many batches"
    ), message


def test_an_error_in_the_loss_of_one_rank(start, tmp_path):
    ends = start(tmp_path, """
step = make()
state = step.init(params)
for t in range(6):
    if t == 3 and RANK == 1:
        bad = 1
        apart()
    state, m = step(state, step.local_rows(rows))
""")  # fmt: skip
    message = told(ends)
    assert message.startswith(
        "rank 1 left with ValueError: bad sample 17 in step(state, batch) at step 3, while rank 0 launched"
        " reduce_scatter over 'data' of "
    ), message
    assert message.endswith(" at step 3; an error on one rank ends all"), message
    assert "Traceback" in ends[1].err and "ValueError: bad sample 17\n" in ends[1].err  # its own, by itself


@pytest.mark.slow
def test_an_error_that_one_rank_survives(start, tmp_path):
    message = told(start(tmp_path, """
step = make()
state = step.init(params)
for t in range(6):
    if t == 3 and RANK == 1:
        bad = 1
        apart()
    try:
        state, m = step(state, step.local_rows(rows))
    except ValueError:
        time.sleep(60)
"""))  # fmt: skip
    assert message.startswith(
        "rank 1 raised ValueError: bad sample 17 in step(state, batch) at step 3, while rank 0 launched reduce_scatter"
        " over 'data' of "
    ), message


@pytest.mark.parametrize("at", [3, pytest.param(5, marks=pytest.mark.slow)], ids=["in the middle", "at the end"])
def test_saving_on_rank_0_only(start, tmp_path, at):
    message = told(start(tmp_path, f"""
step = make()
state = step.init(params)
for t in range(6):
    state, m = step(state, step.local_rows(rows))
    if t == {at} and RANK == 0:
        apart()
        torch.save(step.params(state), os.devnull)
"""))  # fmt: skip
    if at == 3:
        assert re.match(
            r"rank 0 launched all_gather over 'data' of \d+ bytes of float32 in step.params at step 4, while rank 1"
            r" launched all_gather over 'data' of ",
            message,
        ), message
        assert " in step(state, batch) with 12 rows at step 4; " in message, message
        assert message.endswith("; every rank must make the same calls: step.params on all ranks or on none"), message
    else:
        assert re.match(
            r"rank 1 left after step 5, while rank 0 launched all_gather over 'data' of \d+ bytes of float32 in"
            r" step.params at step 6; ",
            message,
        ), message
        assert message.endswith("; every rank must make as many calls of step.params"), message


@pytest.mark.slow
def test_another_chain_on_one_rank(start, tmp_path):
    message = told(start(tmp_path, """
step = make(accumulate=2 + 2 * RANK)
apart()
state = step.init(params)
for t in range(6):
    state, m = step(state, step.local_rows(rows))
"""))  # fmt: skip
    assert message.startswith(
        "rank 1 launched connect over 'data=2' in train_step at step 0, while rank 0 launched "
    ), message
    assert re.search(
        r"; every rank must build the same chain from like parameters, but one has .accumulate\(4\) -> sum, .* where"
        r" others have .accumulate\(2\) -> sum, ",
        message,
    ), message


@pytest.mark.slow
def test_another_spec_on_one_rank(start, tmp_path):
    message = told(start(tmp_path, """
grad = fz.value_and_grad(loss_fn, batch=P("data"))
step = fz.train_step(fz.shard("data", grad, fz.adamw(1e-2), threshold=100 * RANK), mesh={"data": -1})
apart()
state = step.init(params)
for t in range(6):
    state, m = step(state, step.local_rows(rows))
"""))  # fmt: skip
    assert (
        "every rank must build the same chain from like parameters, but one has \"Leaf(path='w2', shape=(16, 4),"
        " unit=0, cuts=(('data', Whole()),))\" where others"
        in message
    )


@pytest.mark.slow
def test_other_rows_on_one_rank_are_right(start, tmp_path):
    ends = start(tmp_path, """
step = make(stage=0, accumulate=1)
state = step.init(params)
for t in range(6):
    mine = step.local_rows(rows)
    if t == 3 and RANK == 1:
        mine = {n: x[:-1] for n, x in mine.items()}
    state, m = step(state, mine)
    if t == 3:
        print(m.weight.item())
""")  # fmt: skip
    assert [(e.code, e.out, e.err) for e in ends] == [(0, "23.0\n", "")] * 2


HEALTHY = """
step = make(stage=0, accumulate=1)
state = step.init(params)
for t in range(4):
    slow = 0 if t != 2 or RANK == 0 else SLEEP
    state, m = step(state, step.local_rows(rows))
    if RANK == 0:
        step.params(state)  # nothing is sent at stage 0
        try:
            step(m, rows)
        except TypeError:
            pass
if RANK == 0:
    torch.distributed.destroy_process_group()
time.sleep(3 * RANK)  # one rank ends long before the other
print("end")
"""


@pytest.mark.parametrize("seconds", [0, pytest.param(12, marks=pytest.mark.slow)])
def test_ranks_that_do_the_same_are_left_alone(start, tmp_path, seconds):
    """One that is late for longer than ten seconds is named by the one that waits for it, once a launch."""
    ends = start(tmp_path, f"SLEEP = {seconds}\n{HEALTHY}")
    lines = [[line for line in e.err.splitlines() if "funczero" in line or "TCPStore" in line] for e in ends]
    assert [(e.code, e.out) for e in ends] == [(0, "end\n")] * 2 and lines[1] == [], ends
    named = re.compile(r"funczero: rank 0 launched .* and has waited \d+ s for rank 1, which is alive in ")
    assert [bool(named.match(line)) for line in lines[0]] == [True] * (seconds > 10), ends


@pytest.mark.slow
def test_a_text_in_the_store_that_nothing_supports_ends_nobody(start, tmp_path):
    ends = start(tmp_path, """
import torch.distributed as dist
step = make()
state = step.init(params)
for t in range(30):
    state, m = step(state, step.local_rows(rows))
    if t == 3 and RANK == 1:
        dist.distributed_c10d._get_default_store().set("funczero/check/1/verdict", "all is lost")
    if t > 3:
        time.sleep(0.3)
print("end", flush=True)
""")  # fmt: skip
    assert [(e.code, e.out) for e in ends] == [(0, "end\n")] * 2, ends
    assert all("goes on: the world's store says 'all is lost', but no rank is silent" in e.err for e in ends), ends


@pytest.mark.slow
def test_a_long_wait_for_a_rank_elsewhere_is_said_and_not_ended(start, tmp_path):
    ends = start(tmp_path, """
step = make()
state = step.init(params)
for t in range(3):
    if t == 2 and RANK == 1:
        time.sleep(13)
    state, m = step(state, step.local_rows(rows))
""")  # fmt: skip
    assert [e.code for e in ends] == [0, 0], ends
    (line,) = (line for line in ends[0].err.splitlines() if line.startswith("funczero: "))
    assert line.startswith("funczero: rank 0 launched all_gather over 'data' of "), line
    assert re.search(
        r" at step 2 and has waited 1[0-2] s for rank 1, which is alive in no call; it last launched all_reduce over"
        r" 'data' of .* at step 1$",
        line,
    ), line


SILENT = """
import subprocess, signal
step = make()
state = step.init(params)
for t in range(25):
    time.sleep(0.1)
    if t == 20 and RANK == VICTIM:
        apart()
        END
    state, m = step(state, step.local_rows(rows))
"""


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_the_run_goes_on(start, tmp_path):
    stop = "subprocess.Popen(['sh', '-c', f'sleep 16; kill -CONT {os.getpid()}']); os.kill(os.getpid(), signal.SIGSTOP)"
    ends = start(tmp_path, SILENT.replace("VICTIM", "1").replace("END", stop))
    assert [e.code for e in ends] == [0, 0], ends
    (line,) = (line for line in ends[0].err.splitlines() if line.startswith("funczero: "))
    assert re.search(
        r" for rank 1, which gives no sign of life for 1\d s \(stopped, starved, or its machine is gone\); it last"
        r" launched ",
        line,
    ), line


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "end",
    ["os._exit(3)", pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", marks=pytest.mark.slow)],
    ids=["exit", "segv"],
)
def test_a_rank_that_dies_after_the_first_updates_is_named_with_its_step(start, tmp_path, victim, end):
    ends = start(tmp_path, SILENT.replace("VICTIM", str(victim)).replace("END", end))
    dead, left = ends[victim], ends[1 - victim]
    assert dead.code in (3, -11) and left.code == 1, ends
    assert left.when - float(dead.out.split()[1]) < LIMIT
    (said,) = (m.group(1) for line in left.err.splitlines() if (m := SAID.match(line)))
    if victim:
        died = (
            r"rank 1 died: a connection to it broke and it gave no sign of life for 3 s; it last launched all_\w+ over"
            r" 'data' of .* at step 1\d"
        )
        assert re.match(f"{died}, while rank 0 launched all_gather ", said), said
    else:
        assert re.match(
            r"rank 0 died or left, and the world's store with it, while rank 1 launched all_gather over 'data' of .* at"
            r" step 20; ",
            said,
        ), said

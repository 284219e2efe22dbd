"""launch/processes.py: a tree is at its end when the process that adopts its orphans has no child, and not sooner."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from funczero.launch.node import Node

SCRIPT = """
import os, signal, sys, time
from funczero.launch.processes import Ending, adopt_orphans, childless, descendants, reap

adopt_orphans()
assert childless()
read, write = os.pipe()
if not os.fork():  # its child leaves the session and ignores SIGTERM
    if not os.fork():
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(write, b"%d " % os.getpid())
        time.sleep(600)
    time.sleep(600)
child = int(os.read(read, 64))
assert len(descendants()) == 2 and not childless()
clock = [0.0]
blind = Ending(lambda: clock[0], lambda: [])  # as a look that a parent's end came in between
assert not blind.over()  # nothing is seen, and something is there
ending = Ending(lambda: clock[0])
until = time.monotonic() + 30
while not ending.over():
    assert time.monotonic() < until
    reap()
    clock[0] += 1.0
    time.sleep(0.02)
assert not os.path.exists(f"/proc/{child}"), "left"
if not os.fork():
    os._exit(0)
time.sleep(0.2)
assert not ending.over() and reap() and ending.over()  # a child that ended is one until it is reaped
print("over")
"""


@pytest.mark.slow
def test_nothing_is_left_where_it_says_so():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.stdout == "over\n", done.stderr


def test_who_died_first_is_the_cause_though_anothers_traceback_is_read_before(monkeypatch):
    """A killed rank has no last words; while they are looked for, those come of the rank that was ended for it."""
    said, now = [], time.monotonic()
    node = Node.__new__(Node)
    node.orders, node.ending, node.noticed, node.failed = {"max_restarts": 0}, None, False, False
    node.ranks = {i: {"rank": i, "pid": 10 + i, "restart": 0} for i in (0, 1)}
    node.deaths, node.traces = [], {}
    node.speaker = SimpleNamespace(say=lambda **what: said.append(what))
    monkeypatch.setattr(Node, "read", lambda self, timeout: self.traces.setdefault(1, now + 0.1))
    monkeypatch.setattr(Node, "end", lambda self: setattr(self, "ending", True))
    node._told({"pid": 10, "code": -9, "at": now})
    node._told({"pid": 11, "code": 1, "at": now + 0.2})
    assert [(x["failed"], x["code"]) for x in sorted(said, key=lambda x: -x["age"])] == [(0, -9), (1, 1)]

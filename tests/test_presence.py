"""Who has ended is known by proof, and a store that is lost is found out in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from funczero.world import presence

SERVER = """
import sys, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.readline()
"""


def test_a_process_has_ended_when_it_has():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start = open(f"/proc/{child.pid}/stat").read().rpartition(")")[2].split()[19]
    who = " ".join([*presence.identity().split()[:2], str(child.pid), start])
    assert not presence.ended(who) and presence.number(who) == str(child.pid)
    assert presence.ended(" ".join([*who.split()[:3], "1"]))  # another process of that number
    child.kill()
    time.sleep(0.2)
    assert presence.ended(who)  # though nobody has waited for it
    child.wait()
    assert presence.ended(who)
    for other in (
        "",
        "x",
        who.replace(who.split()[0], "elsewhere"),
        " ".join([*who.split()[:2], "x", "1"]),
        " ".join([*who.split()[:2], "9" * 30, "1"]),
    ):
        assert not presence.ended(other)  # nothing is known


class Dying:
    """A store whose server is lost, or stopped, right after it has answered."""

    def __init__(self, store, end):
        self.store, self.end, self.timeout, self.set_timeout, self.clone = (
            store,
            end,
            store.timeout,
            store.set_timeout,
            store.clone,
        )

    def check(self, keys):
        self.store.check(keys)
        self.end()


@pytest.mark.parametrize("how", ["kill", *(pytest.param(x, marks=pytest.mark.slow) for x in ("stop", "killed before"))])
def test_a_lost_store_is_found_out_in_seconds(how):
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), 1, is_master=False, wait_for_workers=False)
        presence.connection(store).set("x", "1")
        before = store.timeout
        end = {
            "kill": lambda: (server.kill(), server.wait()),
            "stop": lambda: os.kill(server.pid, 19),
            "killed before": lambda: None,
        }[how]
        if how == "killed before":
            server.kill()
            server.wait()
        start = time.monotonic()
        with pytest.raises(
            RuntimeError, match="rank 0 cannot reach the world's store, so rank 0, or who holds it, is gone"
        ):
            presence.connection(Dying(store, end), seconds=2.0)
        assert time.monotonic() - start < 8
        while how != "stop" and store.timeout != before:  # the attempt may still be at its end
            assert time.monotonic() - start < 20
            time.sleep(0.05)
    finally:
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()

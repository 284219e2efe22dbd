"""Where ranks meet: what listens, who is told that a name means nothing, and that the store's holder leaves last."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from funczero.world import rendezvous

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def world(body, size=2, address="127.0.0.1"):
    """A script as ranks of a world that no launcher made: rank 0 holds the store."""
    port = str(free_port())
    begin = (
        "import sys, time\nimport torch.distributed as dist\n"
        "from funczero.layout.processes import init_distributed\nw = init_distributed()"
    )
    script = f"{begin}\nstore = dist.distributed_c10d._get_default_store()\n{body}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
    }
    own = {"MASTER_ADDR": address, "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script], env=clean | own | {"RANK": str(r), "LOCAL_RANK": str(r)}, **pipes
        )
        for r in range(size)
    ], int(port)


def ended(ranks, timeout=60):
    try:
        said = [p.communicate(timeout=timeout) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    return [p.returncode for p in ranks], said


def reached(address, port):
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex((address, port)) == 0


def test_a_listener_is_at_one_address():
    """127.0.0.2 is another address of this host: as a stranger's way in it stands for every other interface."""
    one = rendezvous.listen("127.0.0.1", 0, alone=False)
    with one.socket:
        assert one.said == "" and reached("127.0.0.1", one.port) and not reached("127.0.0.2", one.port)
    store = rendezvous.serve(rendezvous.listen("127.0.0.2", 0, alone=True), "127.0.0.2", 0)
    assert not reached("127.0.0.1", store.port)
    other = rendezvous.visit("127.0.0.2", store.port)
    other.set("a", "b")
    assert store.get("a") == b"b"


@pytest.mark.parametrize("address", [socket.gethostname(), "192.0.2.7"])
def test_where_an_address_is_no_use_every_interface_listens_and_that_is_said(monkeypatch, address):
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7" if address[0] == "1" else "127.0.1.1", 0))
        ],
    )
    found = rendezvous.listen(address, 0, alone=False)
    with found.socket:
        why = "it is no address of this host" if address[0] == "1" else "the name means this host alone here"
        assert (
            found.said.startswith(f"the store of the world listens on every interface, because of {address!r}: {why}; ")
            and str(found.port) in found.said
            and reached("127.0.0.1", found.port)
        )
    if address[0] != "1":
        alone = rendezvous.listen(address, 0, alone=True)  # then nobody else needs it
        with alone.socket:
            assert alone.said == "" and alone.socket.getsockname()[0] == "127.0.1.1"


@pytest.mark.parametrize("address", ["nosuch.invalid", "no host", "x" * 300, "a..b", "\x1b[31m"])
def test_a_name_that_means_nothing_is_told_at_once(address):
    since = time.monotonic()
    with pytest.raises(ValueError, match="the address of rank 0's host, '.*', means nothing on ") as caught:
        rendezvous.resolve(address, 1)
    assert time.monotonic() - since < 5 and str(caught.value).isprintable()


def test_a_world_waits_a_moment_for_a_name_and_says_so(ends, tmp_path):
    own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nosuch.invalid", "MASTER_PORT": "29500"}
    script = f"import os\nos.environ |= {own}\nfrom funczero.layout.processes import init_distributed"
    (told,) = ends.run(tmp_path / "life", f"{script}\ninit_distributed()")
    code, err = told["code"], told["err"]
    assert code == 1
    assert (
        "funczero: the address of rank 0's host, 'nosuch.invalid', means nothing here yet; it is tried for 5 s" in err
    )
    assert "RuntimeError: init_distributed: the address of rank 0's host, 'nosuch.invalid', means nothing on " in err
    assert err.splitlines()[-1].endswith("give every rank in MASTER_ADDR an address that its host knows")


@pytest.mark.parametrize("port", ["", "x", "-1", "70000", "９"])
def test_a_port_that_is_none_is_told(port):
    with pytest.raises(
        RuntimeError, match="init_distributed: MASTER_PORT='.*' is no port; write a number from 1 to 65535"
    ):
        rendezvous.join({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, {})


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            RuntimeError,
            match=f"init_distributed: port {port} of 127.0.0.1 cannot be had .*; give every rank another MASTER_PORT",
        ):
            rendezvous.join({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, {})


@pytest.mark.slow
def test_the_holder_of_the_store_leaves_last():
    """Rank 0 ends at once, rank 1 writes to the store two seconds later: it used to find nobody."""
    ranks, port = world(
        "if w.rank == 0: print('ready', flush=True)\nelse:\n    time.sleep(2)\n    store.set('late', 'x')\n    assert"
        " store.get('late') == b'x'"
    )
    assert ranks[0].stdout.readline() == "ready\n" and reached("127.0.0.1", port) and not reached("127.0.0.2", port)
    codes, said = ended(ranks)
    assert codes == [0, 0], said


@pytest.mark.slow
def test_it_does_not_wait_for_the_dead():
    ranks, _ = world("print('ready', flush=True)\nif w.rank == 1: time.sleep(100)\nelse: sys.stdin.readline()")
    for p in ranks:
        assert p.stdout.readline() == "ready\n"
    ranks[1].send_signal(signal.SIGKILL)
    since = time.monotonic()
    codes, said = ended(ranks, timeout=rendezvous.LAST + 10)
    assert codes == [0, -9] and time.monotonic() - since < rendezvous.LAST + 8, said


@pytest.mark.slow
def test_it_does_not_wait_after_an_error():
    """The others are to hear of it."""
    ranks, _ = world("if w.rank == 1: time.sleep(5)\nelse: raise SystemError('unwell')")
    since = time.monotonic()
    assert ranks[0].wait(60) == 1 and ranks[1].poll() is None, time.monotonic() - since
    ended(ranks)

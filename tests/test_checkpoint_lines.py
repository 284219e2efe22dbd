"""This process's connections to the world's store are made while other threads open and close theirs."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager

import torch.distributed as dist

from funczero.checkpoint.lines import SILENCE, Line


@contextmanager
def churning():
    """Threads that open and close sockets and files all the time, as a backend does while it connects."""
    over = threading.Event()

    def churn():
        while not over.is_set():
            pair = socket.socketpair()
            for s in pair:
                s.close()
            os.close(os.open("/dev/null", os.O_RDONLY))

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for t in threads:
        t.start()
    try:
        yield
    finally:
        over.set()
        for t in threads:
            t.join()


def test_descriptors_that_others_close_meanwhile_are_no_error():
    base = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    with churning():
        made = [Line(base, 0, SILENCE) for _ in range(20)]
    for i, line in enumerate(made):
        line.ask("set", f"key{i}", b"1")
        assert line.ask("get", f"key{i}") == b"1"

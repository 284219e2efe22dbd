"""A stranger at the world's store, what launchers say of the world, and what a host says to the launcher."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import zlib
from datetime import timedelta
from pathlib import Path

from hostile import Case

from funczero.launch.events import event_of
from funczero.world import environment, rendezvous
from funczero.world.plain import unpack

HELLO = b"\0" + struct.pack("<I", 0x3C85F7CE)  # how a client of torch's store begins
QUICK = timedelta(seconds=3)


class Refused(Exception):
    """What these cases end with where nothing raises: the store still answered its own clients."""


def stranger(*messages: bytes):
    """Bytes to the port of a store, each on a connection that is kept open; afterwards its own client must still be
    served.
    """

    def attempt(_: Path) -> None:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)  # torch writes a C++ trace for each
        store = rendezvous.serve(rendezvous.listen("127.0.0.1", 0, True), "127.0.0.1", 0, QUICK)
        client = rendezvous.visit("127.0.0.1", store.port, QUICK)
        client.set("a", "before")
        held = []
        for message in messages:
            s = socket.create_connection(("127.0.0.1", store.port))
            held.append(s)
            s.settimeout(0.05)
            try:
                s.sendall(message)
                s.recv(100)
            except OSError:
                pass
        assert client.get("a") == b"before" and store.add("n", 1) == 1
        raise Refused("the store still answers")

    return attempt


def elsewhere(_: Path) -> None:
    """The store of a run on one address is not reached at another."""
    store = rendezvous.serve(rendezvous.listen("127.0.0.1", 0, True), "127.0.0.1", 0, QUICK)
    with socket.socket() as s:
        if s.connect_ex(("127.0.0.2", store.port)) == 0:
            return
    raise Refused("nobody listens there")


def world(**names: str):
    def attempt(_: Path) -> None:
        found = environment.read(
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | names
        )
        rendezvous.join(found or {}, {})

    return attempt


def said(text: str):
    """A line that a host's login script, or a rank, might say to the launcher: a word, never an event."""

    def attempt(_: Path) -> None:
        if event_of(text) is None:
            raise Refused("a word like any other")

    return attempt


def packed(data: bytes, most: int = 1 << 20):
    def attempt(_: Path) -> None:
        unpack(data, most)

    return attempt


BOMB = zlib.compress(b" " * (1 << 30), 1)
rng = random.Random(0)
CASES = [
    Case("noise", stranger(*(rng.randbytes(4096) for _ in range(20))), (Refused,)),
    Case("a hundred connections", stranger(*[HELLO] * 100), (Refused,)),
    Case(
        "every question with a length that nobody has",
        stranger(*(HELLO + bytes([q]) + struct.pack("<Q", 2**62) for q in range(24))),
        (Refused,),
    ),
    Case(
        "a value larger than may be",
        stranger(HELLO + b"\0" + struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 2**33)),
        (Refused,),
    ),
    Case("another address", elsewhere, (Refused,)),
    Case("a rank of many digits", world(RANK="9" * 5000), (RuntimeError,)),
    Case("a rank of other digits", world(RANK="１"), (RuntimeError,)),
    Case("a world below zero", world(WORLD_SIZE="-1"), (RuntimeError,)),
    Case("an address of escape sequences", world(MASTER_ADDR="\x1b]0;x\x07"), (RuntimeError,)),
    Case("an address without an end", world(MASTER_ADDR="a" * 10**5), (RuntimeError,)),
    Case("a port of many digits", world(MASTER_PORT="9" * 5000), (RuntimeError,)),
    Case("a port of another's", world(MASTER_PORT="$(touch pwned)"), (RuntimeError,)),
    Case("packed: a bomb", packed(BOMB), (ValueError,)),
    Case("packed: noise", packed(rng.randbytes(1 << 16)), (ValueError,)),
    Case("packed: brackets", packed(zlib.compress(b"[" * 500_000)), (ValueError,)),
    Case("packed: half of it", packed(zlib.compress(json.dumps([1] * 10_000).encode())[:20]), (ValueError,)),
    Case("a greeting with a mark", said("\x1e"), (Refused,)),
    Case("a greeting of brackets", said("\x1e" + "[" * 10**6), (Refused,)),
    Case("an event of no host", said('\x1e{"failed": 0}'), (Refused,)),
    Case("an event whose host is a text", said('\x1e{"node": "0", "end": 0}'), (Refused,)),
]

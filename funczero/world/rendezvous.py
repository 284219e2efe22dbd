"""Where the ranks of a world meet: a store bound to the address of the run, a name that is resolved before it is waited
for, a holder who leaves last.

Law: nobody who cannot reach that one address can read or write the store; who can, is trusted (docs/security.md).
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from absl import logging
from torch.distributed.constants import default_pg_timeout

from funczero.world.plain import plain

# seconds in which a name may come to mean something: in a cluster a host may be known a moment after it starts
RESOLVE = 5.0
LAST = 10.0  # seconds that the holder of the store stays for the others
ASK = timedelta(seconds=5)  # of a last word
# an address of another host, or of a kind that this one has not
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
LOCAL = ("localhost", "::1", "[::1]")


class Listener(NamedTuple):
    """A socket that listens for the store, and what is to be said about it ('' where it is bound to the run's
    address).
    """

    socket: socket.socket
    said: str

    @property
    def port(self) -> int:
        """The port it has."""
        port: int = self.socket.getsockname()[1]
        return port


def resolve(address: str, port: int, patience: float = 0.0) -> list[Any]:
    """getaddrinfo's answers for rank 0's address, IPv4 first.

    Args:
      patience: seconds in which the name may become known.

    Raises:
      ValueError: it means nothing here.

    >>> [info[4][0] for info in resolve("127.0.0.1", 1)]
    ['127.0.0.1']
    """
    until, name = time.monotonic() + patience, address[1:-1] if address.startswith("[") else address
    while True:
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            return sorted(found, key=lambda info: info[0] != socket.AF_INET)
        except (OSError, UnicodeError) as error:  # a name that no host can have is a UnicodeError
            why = getattr(error, "strerror", None) or "no host can have this name"
        if time.monotonic() >= until:
            raise ValueError(
                f"the address of rank 0's host, {plain(address, 300)!r}, means nothing on {socket.gethostname()}"
                f" ({why})"
            )
        if patience and time.monotonic() + patience - until < 1.0:
            print(
                f"funczero: the address of rank 0's host, {plain(address, 300)!r}, means nothing here yet; it is tried"
                f" for {patience:g} s",
                file=sys.stderr,
                flush=True,
            )
            patience = 0.0
        time.sleep(0.5)


def listen(address: str, port: int, alone: bool) -> Listener:
    """A socket bound to the address of the run, and to no other.

    A name may mean another address here than elsewhere (a host's own name is often 127.0.1.1 to itself), or one that is
    not this host's (a service, a translated one). Then every interface listens, as torch's own store always does, and
    that is said.

    Args:
      address: rank 0's, as the ranks know it; this is its host.
      port: 0 for a free one.
      alone: all ranks are on this host.

    Raises:
      ValueError: the address means nothing here.
      OSError: the port is taken.
    """
    found = resolve(address, port)
    loopback = [info for info in found if info[4][0].startswith("127.") or info[4][0] == "::1"]
    mine = alone or address in LOCAL or address.startswith("127.")
    for info in found if mine else [info for info in found if info not in loopback]:
        try:
            return Listener(socket.create_server(info[4], family=info[0], backlog=2048), "")
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
    why = "the name means this host alone here" if loopback and not mine else "it is no address of this host"
    if socket.has_dualstack_ipv6():
        every = socket.create_server(("", port), family=socket.AF_INET6, backlog=2048, dualstack_ipv6=True)
    else:
        every = socket.create_server(("", port), backlog=2048)
    said = f"the store of the world listens on every interface, because of {plain(address, 300)!r}: {why}"
    return Listener(
        every, f"{said}; give rank 0's own address, or keep its port {every.getsockname()[1]} closed to others"
    )


def serve(listener: Listener | int, address: str, port: int, timeout: timedelta = default_pg_timeout) -> dist.TCPStore:
    """A store on a listening socket, or on its descriptor; the store closes it."""
    fd = listener if isinstance(listener, int) else listener.socket.detach()
    libuv = os.environ.get("USE_LIBUV", "1") == "1"  # as torch reads it
    return dist.TCPStore(
        _bare(address),
        port,
        None,
        True,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=fd,
        use_libuv=libuv,
    )


def visit(address: str, port: int, timeout: timedelta = default_pg_timeout) -> dist.TCPStore:
    """A store that another process holds."""
    return dist.TCPStore(_bare(address), port, None, False, timeout, wait_for_workers=False)


def join(found: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """`store`, `rank` and `world_size` for `init_process_group`, as torch's env:// makes them, but for where the store
    listens and who leaves last.

    Under torchrun its agent holds the store, and nothing of this process listens. Elsewhere rank 0 does.

    Args:
      found: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as `environment.read` returns them.

    Raises:
      RuntimeError: rank 0's address means nothing here, or its port is no port or is taken.
    """
    rank, size, address = int(found["RANK"]), int(found["WORLD_SIZE"]), found["MASTER_ADDR"]
    said = found["MASTER_PORT"]
    if not (said.isascii() and said.isdigit() and len(said) < 6 and int(said) < 65536):
        raise RuntimeError(
            f"init_distributed: MASTER_PORT={plain(said, 100)!r} is no port; write a number from 1 to 65535"
        )
    port, lent = int(said), environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        resolve(address, port, RESOLVE)
    except ValueError as error:
        raise RuntimeError(
            f"init_distributed: {error}; give every rank in MASTER_ADDR an address that its host knows"
        ) from None
    base = visit(address, port) if lent or rank else _held(address, port, environ.get("LOCAL_WORLD_SIZE") == str(size))
    if not lent and size > 1:
        _leave_last(base, rank, size)
    return {"store": dist.PrefixStore("default_pg", base), "rank": rank, "world_size": size}


def _held(address: str, port: int, alone: bool) -> dist.TCPStore:
    try:
        listener = listen(address, port, alone)
    except OSError as error:
        try:
            # this process's own, of an earlier world
            return dist.TCPStore(
                _bare(address), port, None, True, default_pg_timeout, wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError:
            raise RuntimeError(
                f"init_distributed: port {port} of {plain(address, 300)} cannot be had ({error.strerror}); give every"
                " rank another MASTER_PORT"
            ) from None
    if listener.said:
        logging.warning("init_distributed: %s", listener.said)
    return serve(listener, address, listener.port)


def _leave_last(base: Any, rank: int, size: int) -> None:
    """At exit every rank says so, and rank 0, whose process holds the store, waits for the others; not after an
    error, which the others are to hear of.
    """
    # a connection that no wait of another thread blocks; made now, because making one later may hang where the store is
    # gone
    own = base.clone()
    own.set_timeout(ASK)
    pid = os.getpid()

    def leave() -> None:
        if os.getpid() != pid:
            return
        with contextlib.suppress(RuntimeError):  # the store is gone: there is nobody to tell
            gone, until = own.add("funczero/gone", 1), time.monotonic() + LAST
            while rank == 0 and gone < size and time.monotonic() < until and not hasattr(sys, "last_value"):
                time.sleep(0.01)
                gone = own.add("funczero/gone", 0)

    atexit.register(leave)


def _bare(address: str) -> str:
    return address[1:-1] if address.startswith("[") else address

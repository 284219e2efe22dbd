"""A node's orders: reading them, and taking over the folder, the environment and the devices they name."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Sequence
from typing import Any

from funczero.launch.cores import bound, own_cores
from funczero.launch.error import LaunchError
from funczero.launch.job import with_shim
from funczero.world.rendezvous import Listener, listen, resolve


def read_orders(argv: Sequence[str]) -> tuple[dict[str, Any] | None, bytes]:
    """The orders and what followed them: from standard input, or with pdsh, which hands on none, from the command
    line: HOSTNUMBER and all hosts' orders.
    """
    if argv:
        return json.loads(zlib.decompress(base64.urlsafe_b64decode(argv[1])))[int(argv[0])], b""
    data = b""
    while b"\n" not in data:
        piece = os.read(0, 1 << 16)
        if not piece:
            return None, b""
        data += piece
    line, _, rest = data.partition(b"\n")
    return json.loads(line), rest


def prepare(orders: dict[str, Any]) -> Listener | None:
    """Take over folder, environment and devices; on rank 0's host, the socket that the agents' store is to listen on.

    Raises:
      LaunchError: the run cannot start here; one sentence says why.
    """
    try:
        os.chdir(orders["cwd"])
    except OSError as error:
        raise LaunchError(
            f"the working folder {orders['cwd']!r} is not there ({error.strerror}); every host needs it, so start from"
            " a shared one"
        ) from None
    script = orders["script"]
    if not (orders["module"] or orders["no_python"] or os.path.exists(script)):
        raise LaunchError(f"the script {script!r} is not in {orders['cwd']}; every host needs it at the same place")
    os.environ.update(orders["env"])
    if orders["as_deepspeed"]:  # funczero may lie elsewhere on this host than where the command was given
        _, *others = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = with_shim(os.pathsep.join(others))
    os.environ["CUDA_VISIBLE_DEVICES"] = devices(orders["slots"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "3"
    if orders["max_restarts"]:
        # a store a start: in a shared one a host that did not fail itself reads its last start's addresses
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if orders.get("cores") is not None:
        orders["bound"] = bound(orders["cores"], len(orders["slots"]), orders["host"])
        each = len(orders["cores"] or own_cores()) // len(orders["slots"])
        os.environ["OMP_NUM_THREADS"] = str(each)
    if len(orders["slots"]) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's rule, without its banner
    try:
        if orders["node_rank"] > 0:
            resolve(orders["master_addr"], orders["master_port"])
            return None
        listener = listen(orders["master_addr"], orders["master_port"], orders["nodes"] == 1)
    except ValueError as error:
        raise LaunchError(f"{error}; add --master_addr=ADDRESS that all hosts know") from None
    except OSError as error:
        raise LaunchError(
            f"port {orders['master_port']} cannot be had ({error.strerror}); name another one with --master_port"
        ) from None
    orders["master_port"] = listener.port
    return listener


def devices(slots: Sequence[int], visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a host: its slots, counted among what it lets this user see.

    >>> devices([0, 2], None), devices([0, 2], "4,5,6,7"), devices([0, 1], "")
    ('0,2', '4,6', '')
    """
    if visible is None:
        return ",".join(map(str, slots))
    seen = [name.strip() for name in visible.split(",") if name.strip()]
    if seen and max(slots) >= len(seen):
        raise LaunchError(
            f"slot {max(slots)} is asked for, but CUDA_VISIBLE_DEVICES={visible!r} shows {len(seen)} devices here; use"
            f" slots below {len(seen)}"
        )
    return ",".join(seen[s] for s in slots) if seen else ""

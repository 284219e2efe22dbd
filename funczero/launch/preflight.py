"""Could this run start? Every host is asked at once, before it costs anything; one table answers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any

from funczero.launch.job import Plan
from funczero.launch.transports import node_command

ANSWER = 60.0  # seconds a host has
SKEW = 5.0  # seconds that clocks may differ
SPACE = 1.0  # GiB that the working folder's disk should have
SAME = ("python", "torch", "funczero")


def facts(orders: Mapping[str, Any]) -> dict[str, Any]:
    """What one host says of itself; nothing is changed there, the port is tried and let go."""
    import torch

    there = os.path.isdir(orders["cwd"])
    script = os.path.join(orders["cwd"], orders["script"])
    need = bool(orders["script"]) and not (orders["module"] or orders["no_python"])
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "funczero": importlib.metadata.version("funczero"),
        "folder": there,
        "script": os.path.isfile(script) if need else None,
        "port": _port_is_free(orders["master_port"]) if orders["node_rank"] == 0 else None,
        "address": _known(orders["master_addr"]),
        "clock": time.time(),
        "disk": shutil.disk_usage(orders["cwd"] if there else "/").free / 2**30,
        "devices": torch.accelerator.device_count() if torch.accelerator.is_available() else None,
    }


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _known(address: str) -> bool:
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        return False
    return True


def ask(plan: Plan) -> dict[str, dict[str, Any]]:
    """Every host's facts, and when they arrived; {"said": ...} where a host did not answer."""
    answers: dict[str, dict[str, Any]] = {}

    def one(node: Any) -> None:
        command = node_command(plan, node, preflight=True)
        try:
            done = subprocess.run(
                command.argv,
                input=command.stdin,
                capture_output=True,
                timeout=ANSWER,
                env=os.environ | command.env,
                cwd=command.cwd,
            )
        except subprocess.TimeoutExpired:
            answers[node.host] = {"said": f"no answer within {ANSWER:g} seconds"}
            return
        except OSError as error:
            answers[node.host] = {"said": f"{command.argv[0]}: {error.strerror}"}
            return
        for line in done.stdout.decode(errors="replace").split("\n"):
            mark, event = line.partition("\x1e")[1:]
            if mark and "facts" in (found := json.loads(event)):
                answers[node.host] = found["facts"] | {"arrived": time.time()}
                return
        words = [w for w in (done.stderr or done.stdout).decode(errors="replace").splitlines() if w.strip()]
        answers[node.host] = {"said": words[-1] if words else f"its connection ended with status {done.returncode}"}

    threads = [threading.Thread(target=one, args=(node,)) for node in plan.nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def problems(plan: Plan, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What stands in the way, by host; versions are compared with the first host that answered."""
    first = next((answers[n.host] for n in plan.nodes if "said" not in answers[n.host]), {})
    found: dict[str, list[str]] = {}
    for node in plan.nodes:
        a = answers[node.host]
        if "said" in a:
            found[node.host] = [f"not reached: {a['said']}"]
            continue
        out = [f"{name} is {a[name]}, the first host has {first[name]}" for name in SAME if a[name] != first[name]]
        out += (
            [f"no folder {plan.cwd}"]
            if not a["folder"]
            else [f"no script {plan.options.script}"] if a["script"] is False else []
        )
        out += [f"port {plan.master_port} is taken; name another with --master_port"] if a["port"] is False else []
        out += [] if a["address"] else [f"{plan.master_addr} means nothing here; add --master_addr=ADDRESS"]
        skew = a["clock"] - a["arrived"]
        out += [f"its clock is {skew:+.0f} s off"] if abs(skew) > SKEW else []
        out += [f"{a['disk']:.1f} GiB free in its folder"] if a["disk"] < SPACE else []
        many = a["devices"] is not None and max(node.slots) >= a["devices"]
        out += [f"slot {max(node.slots)} is asked for, it has {a['devices']} devices"] if many else []
        found[node.host] = out
    return found


def preflight(plan: Plan) -> int:
    """Print the table; 0 when every host could start, 1 otherwise."""
    from rich.console import Console
    from rich.table import Table

    answers = ask(plan)
    bad = problems(plan, answers)
    table = Table("host", "slots", *SAME, "disk", "verdict")
    for node in plan.nodes:
        a = answers[node.host]
        disk = f"{a['disk']:.0f} GiB" if "disk" in a else ""
        table.add_row(
            node.host,
            str(len(node.slots)),
            *(str(a.get(name, "")) for name in SAME),
            disk,
            "; ".join(bad[node.host]) or "ready",
        )
    Console(width=None if os.isatty(1) else 500, highlight=False, markup=False).print(table)
    return 1 if any(bad.values()) else 0

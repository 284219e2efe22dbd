"""Two nodes out of network namespaces of this machine, and ranks in them that a script drives line by line: half of
`slow_link.py`.

Each node has two interfaces to the other: `link`, whose rate is limited and whose bytes are counted, and `control`,
over which ranks meet. Nodes live as long as a process of the script holds them: when it ends, in whatever way, they end
with everything in them. Needs root and Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

TOOLS = ("ip", "tc", "unshare", "nsenter")
SPACES = ("--net", "--pid")
HEADER = 66  # bytes of Ethernet, IPv4 and TCP with timestamps before the payload of a packet


class Node(NamedTuple):
    """One namespace; it is held by `holder`, whose end is the end of `init`, which is the end of all in it."""

    number: int
    init: int
    holder: subprocess.Popen

    def enter(self, words: Sequence[str]) -> list[str]:
        """A command line that runs words on this node."""
        return ["nsenter", *SPACES, "-t", str(self.init), "--", *words]

    def sh(self, script: str) -> None:
        """Run a few commands on this node."""
        done = subprocess.run(self.enter(["sh", "-ec", script]), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"node {self.number}: {script!r} ended with {done.returncode}: {done.stderr.strip()}")

    def address(self, network: str) -> str:
        """This node's on "link" or on "control"."""
        return f"10.99.{1 + ('link', 'control').index(network)}.{1 + self.number}"

    def sent(self) -> tuple[int, int]:
        """Bytes and packets that have left over `link`, as the interface counts them."""
        lines = Path(f"/proc/{self.init}/net/dev").read_text().splitlines()
        fields = next(line for line in lines if line.strip().startswith("link:")).partition(":")[2].split()
        return int(fields[8]), int(fields[9])


def missing() -> str:
    """Why there can be no nodes here, as one sentence; '' when there can."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return "nodes out of namespaces need root on Linux; run this as root"
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    if absent:
        return f"not installed: {', '.join(absent)}; they come with the packages iproute2 and util-linux"
    limited = (
        "unshare --net sh -ec 'ip link add name link type veth peer name other; tc qdisc add dev link root"
        f" {_tbf(100)}'"
    )
    for what, command in (("unshare", f"unshare {' '.join(SPACES)} --fork true"), ("tc", limited)):
        tried = subprocess.run(command, shell=True, capture_output=True, text=True)
        if tried.returncode:
            return f"this kernel makes no nodes or limits no link ({what}: {' '.join(tried.stderr.split())})"
    return ""


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that are joined by `link` and `control`, and end with this context."""
    holders: list[subprocess.Popen] = []
    try:
        for _ in range(2):
            # cat ends at the end of its input, so a script that is killed takes its nodes with it
            words = ["unshare", *SPACES, "--fork", "--kill-child", "cat"]
            holders.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0))
        first, second = (Node(i, _init_of(holder), holder) for i, holder in enumerate(holders))
        for network in ("control", "link"):
            _join(first, second, network)
        yield first, second
    finally:
        for holder in holders:
            holder.stdin.close()
        for holder in holders:
            try:
                holder.wait(5)
            except subprocess.TimeoutExpired:
                holder.kill()  # its child goes with it
                holder.wait()


def limit(nodes: Sequence[Node], mbit: int) -> None:
    """`link` takes so many million bits a second each way."""
    for node in nodes:
        node.sh(f"tc qdisc replace dev link root {_tbf(mbit)}")


def _tbf(mbit: int) -> str:
    return f"tbf rate {mbit}mbit burst 128kb limit 64mb"  # a packet before it is cut into frames has up to 64 kB


def _init_of(holder: subprocess.Popen) -> int:
    children, until = Path(f"/proc/{holder.pid}/task/{holder.pid}/children"), time.monotonic() + 20
    while not (found := children.read_text().split()):
        if time.monotonic() > until or holder.poll() is not None:
            raise RuntimeError("a namespace did not start within 20 s")
        time.sleep(0.01)
    return int(found[0])


def _join(first: Node, second: Node, network: str) -> None:
    """A cable; only TCP of IPv4 travels on it: nobody has to ask for an address."""
    macs = [f"02:00:00:00:{('link', 'control').index(network):02x}:{node.number:02x}" for node in (first, second)]
    end = lambda node, mac: ["address", mac, "netns", str(node.init)]
    subprocess.run(
        ["ip", "link", "add", "name", network, *end(first, macs[0]), "type", "veth", "peer", "name", network]
        + end(second, macs[1]),
        check=True,
    )
    for node, other, mac in ((first, second, macs[1]), (second, first, macs[0])):
        node.sh(
            f"echo 1 > /proc/sys/net/ipv6/conf/{network}/disable_ipv6 || true; ip link set dev lo up; "
            f"ip addr add {node.address(network)}/24 dev {network}; ip link set dev {network} up; "
            f"ip neigh replace {other.address(network)} lladdr {mac} nud permanent dev {network}"
        )


# --- ranks ------------------------------------------------------------------------------------------------------------
class Ranks:
    """Processes that run one command line, `each` on every node, and answer JSON lines with JSON lines.

    They are ended with their nodes.
    """

    def __init__(self, nodes: Sequence[Node], each: int, words: Sequence[str], folder: Path) -> None:
        shared = {
            "WORLD_SIZE": each * len(nodes),
            "LOCAL_WORLD_SIZE": each,
            "MASTER_ADDR": nodes[0].address("control"),
            "MASTER_PORT": 29400,
            "GLOO_SOCKET_IFNAME": "link",  # ranks of a node reach each other at its address, which never leaves it
            "OMP_NUM_THREADS": 1,
        }
        self.processes: list[subprocess.Popen] = []
        self.logs = [folder / f"rank{rank}.log" for rank in range(each * len(nodes))]
        for rank, log in enumerate(self.logs):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank % each}
            with log.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        nodes[rank // each].enter(words),
                        env=os.environ | {name: str(value) for name, value in own.items()},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                        process_group=0,
                    )
                )

    def ask(self, question: Mapping[str, Any]) -> list[Any]:
        """What every rank answers; a rank that ends instead is an error with its last lines."""
        for p in self.processes:
            p.stdin.write(json.dumps(question) + "\n")
            p.stdin.flush()
        answers: dict[int, Any] = {}
        while len(answers) < len(self.processes):
            waiting = {p.stdout: rank for rank, p in enumerate(self.processes) if rank not in answers}
            for pipe in select.select(list(waiting), [], [])[0]:
                line = pipe.readline()
                if not line:
                    rank = waiting[pipe]
                    raise RuntimeError(f"rank {rank} has ended:\n{self.logs[rank].read_text(errors='replace')[-3000:]}")
                answers[waiting[pipe]] = json.loads(line)
        return [answers[rank] for rank in range(len(self.processes))]


def questions() -> Iterator[tuple[dict[str, Any], IO[str]]]:
    """In a rank: questions as they come, and where the answer is printed as one line. What others print goes to the
    log.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        yield json.loads(line), answers

"""One host's part of a launch: `python -m funczero.launch.node`, the constant command that every transport runs.

It forks: the guard carries the orders out, its parent cleans up behind it (`keeper`).

Its orders are one line of JSON on standard input, so nothing is quoted and no secret shows in a list of processes. More
lines may follow: an empty one says that the launcher lives, {"signal": 15} is passed on to the ranks. The end of input,
and a silence, end every process that was started here, whatever became of the launcher. What it says are lines that
begin with the ASCII record separator; anything else on its output was said by somebody else.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from funczero.launch.agent import fork_agent
from funczero.launch.events import Speaker
from funczero.launch.job import rank_command, torchrun_arguments
from funczero.launch.keeper import keep
from funczero.launch.meeting import register
from funczero.launch.orders import prepare, read_orders
from funczero.launch.processes import Ending, adopt_orphans, exit_status, reap, send
from funczero.world.rendezvous import Listener

STDIN = ("stdin", "")
TRACEBACK = "Traceback (most recent call last):"
FULL = 1000  # messages that wait for a slow launcher before the ranks have to wait, too


class Node:
    """The ranks of one host: their agent, their pipes, their ends."""

    def __init__(
        self,
        orders: Mapping[str, Any],
        speaker: Speaker,
        early: bytes,
        announce: Callable[[str], None],
        listener: Listener | None = None,
    ) -> None:
        """announce: told the folder before it is made. listener: what the agents' store listens on, on rank 0's
        host.
        """
        self.orders, self.speaker, self.heard, self.said = orders, speaker, time.monotonic(), 0.0
        self.buffers: dict[tuple[str, Any], bytes] = {STDIN: early}
        self.ranks: dict[int, dict[str, Any]] = {}  # by local rank: rank, pid, restart
        self.deaths: list[tuple[float, int, int]] = []  # (when, local rank, code) of this start
        self.traces: dict[int, float] = {}  # when a traceback began, by local rank
        self.ending: Ending | None = None
        self.noticed = False  # a signal was passed on: whoever fails now is not started again
        self.failed = False
        self.agent_code: int | None = None
        self.keeper, self.orphaned = os.getppid(), False
        self.folder, self.announce = Path(tempfile.gettempdir(), f"funczero-{secrets.token_hex(8)}"), announce
        self.listener = listener
        self.selector = selectors.DefaultSelector()

    def start(self) -> None:
        """The pipes, then torchrun's agent."""
        orders = self.orders
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.end())
        self.announce(str(self.folder))
        self.folder.mkdir(mode=0o700)
        argv = rank_command(orders, sys.executable)
        at = len(argv) - len(orders["args"]) if orders["pass_local_rank"] else 0
        (self.folder / "command.json").write_text(
            json.dumps({"argv": argv, "local_rank_at": at, "bound": orders.get("bound")})
        )
        streams = [(name, local) for local in range(len(orders["slots"])) for name in ("out", "err")]
        for name, local in [*streams, ("born", ""), ("told", ""), ("agent", "")]:
            path = self.folder / f"{name}{local}"
            os.mkfifo(path, 0o600)
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # also a writer, so that it never ends
            self.selector.register(fd, selectors.EVENT_READ, (name, local))
        self.selector.register(0, selectors.EVENT_READ, STDIN)
        entry = str(Path(__file__).with_name("entry.py"))
        ends = [os.open(self.folder / name, os.O_WRONLY) for name in ("agent", "told")]
        arguments = torchrun_arguments(orders, sys.executable, entry, str(self.folder))
        where, listening = (orders["master_addr"], orders["master_port"]), (
            self.listener.socket.fileno() if self.listener else None
        )
        self.agent = fork_agent(
            arguments, ends[0], ends[1], lambda note: register(*where, listening, orders["max_restarts"] > 0, note)
        )
        for end in ends:
            os.close(end)
        if self.listener:
            self.listener.socket.close()
            self.note(self.listener.said)

    def run(self) -> int:
        """Until nothing that was started here is left; the exit code of this host."""
        if self.buffers[STDIN]:
            self.take(STDIN, b"")
        over = False
        while not over:
            quick = 0.05 if self.ending or self.agent_code is not None else 0.5
            self.read(quick)
            self.agent_code = reap().get(self.agent, self.agent_code)
            if self.agent_code is not None:
                self.judge()
                self.ending = self.ending or Ending()  # a rank's own children may be left, and they end as well
            over = self.ending is not None and self.ending.over() and self.agent_code is not None
            self.tick()
        while self.read(0):
            pass
        for key in list(self.selector.get_map().values()):
            self.take(key.data, b"\n" if self.buffers.get(key.data) else b"")
        shutil.rmtree(self.folder, ignore_errors=True)
        return 1 if self.failed or self.agent_code else 0

    def end(self) -> None:
        """Begin to end everything."""
        if self.ending is None:
            self.ending = Ending()

    def tick(self) -> None:
        """Say that this host lives; end when nobody has said so to it for too long, or its keeper was killed."""
        now, patience = time.monotonic(), self.orders["lost_after"]
        if os.getppid() != self.keeper:
            self.orphaned = True  # this host counts as lost, as it does when this process is killed
            self.end()
        if now - self.said > 1.0:
            self.said = now
            self.speaker.say(alive=True)
        if patience and now - self.heard > patience:
            self.end()

    def read(self, timeout: float) -> bool:
        """Whatever has arrived; whether that was anything."""
        busy = self.speaker.waiting.qsize() > FULL
        found = False
        for key, _ in self.selector.select(timeout):
            if busy and key.data[0] in ("out", "err") and not self.ending:
                time.sleep(0.01)
                continue
            try:
                data = os.read(key.fd, 1 << 16)
            except BlockingIOError:
                continue
            if key.fd == 0 and not data:
                self.selector.unregister(0)
                self.end()
            else:
                self.take(key.data, data)
                found = True
        return found

    def take(self, key: tuple[str, Any], data: bytes) -> None:
        """Bytes of one pipe, by whole lines; a bar that rewrites its line is a line each time."""
        name, local = key
        whole = (self.buffers.get(key, b"") + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        head, newline, self.buffers[key] = whole.rpartition(b"\n")
        if not newline and len(whole) > 1 << 16:
            head, newline, self.buffers[key] = whole, b"\n", b""  # no line is as long
        if not newline:
            return
        lines = head.decode(errors="replace").split("\n")
        if name in ("out", "err"):
            self.output(local, lines, name == "err")
        elif name == "agent":
            self.speaker.say(lines=lines, rank=None, err=True)
        else:
            for line in lines:
                getattr(self, f"_{name}")(json.loads(line) if line.strip() else {})

    def output(self, local: int, lines: list[str], err: bool) -> None:
        """A rank's lines, and when a traceback of it began."""
        if err and any(TRACEBACK in line for line in lines) and time.monotonic() - self.traces.get(local, -1e9) > 10:
            self.traces[local] = time.monotonic()
        self.speaker.say(lines=lines, rank=self.rank(local), err=err)

    def rank(self, local: int) -> int:
        """A local rank among all."""
        return self.ranks[local]["rank"] if local in self.ranks else self.orders["first"] + local

    def _stdin(self, message: dict) -> None:
        self.heard = time.monotonic()
        if "signal" in message:
            self.noticed = True
            send([born["pid"] for born in self.ranks.values()], message["signal"])

    def _born(self, born: dict) -> None:
        if born["local"] in self.ranks:  # torchrun has started all of them again
            self.ranks, self.deaths, self.traces = {}, [], {}
        self.ranks[born["local"]] = born
        self.speaker.say(born=born["rank"], restart=born["restart"], world=born["world"], pid=born["pid"])

    def _told(self, told: dict) -> None:
        if "note" in told:
            return self.note(told["note"])
        if "error" in told:
            self.failed = True
            self.speaker.say(error=told["error"])
            return
        local = next((local for local, born in self.ranks.items() if born["pid"] == told["pid"]), None)
        if local is None or any(local == other for _, other, _ in self.deaths):
            return
        self.deaths.append((told["at"], local, told["code"]))
        if told["code"] == 0:
            return
        again = self.orders["max_restarts"] > 0 and not self.noticed
        last = not again or self.ranks[local]["restart"] >= self.orders["max_restarts"]
        if self.ending is None and again and -told["code"] in (signal.SIGTERM, signal.SIGKILL):
            # perhaps the agent itself, because another host's ranks start again; what it makes of it, `judge` says
            pass
        elif self.ending is None and last:
            self.fail(local, told["code"])
            self.end()
        elif self.ending is None:
            self.speaker.say(restarting=self.rank(local), code=told["code"])
        elif local in self.traces:  # it was failing when it was told to end: it may be the cause
            self.fail(local, max(told["code"], 1))

    def note(self, text: str) -> None:
        """A sentence for the user, if there is one."""
        if text:
            self.speaker.say(lines=[f"funczero: {text}"], rank=None, err=True)

    def fail(self, local: int, code: int) -> None:
        """Say that a rank has failed by itself, and how long ago that began."""
        self.failed = True
        self.read(0)  # its last words first
        died = next((at for at, other, _ in self.deaths if other == local), time.monotonic())
        began = min(died, self.traces.get(local, died))  # not now: what others say for it may have been read before
        self.speaker.say(failed=self.rank(local), code=code, age=time.monotonic() - began)

    def judge(self) -> None:
        """The agent has ended: with an error, the rank that died first is the cause, or the agent itself."""
        while self.read(0):
            pass
        if self.agent_code and not self.failed and self.ending is None:
            bad = [(local, code) for _, local, code in sorted(self.deaths) if code]
            self.failed = True
            (
                self.fail(*bad[0])
                if bad
                else self.speaker.say(error=f"torchrun's agent ended with status {exit_status(self.agent_code)}")
            )


def main(argv: Sequence[str] = ()) -> int:
    """Read the orders, carry them out, leave nothing behind."""
    return keep(lambda announce: guard(argv, announce))


def guard(argv: Sequence[str], announce: Callable[[str], None]) -> int:
    """Read the orders and carry them out."""
    adopt_orphans()
    orders, early = read_orders(argv)
    if orders is None:
        return 0
    speaker, code = Speaker(orders["node_rank"]), 1
    try:
        if "preflight" in orders:
            from funczero.launch.preflight import facts

            speaker.say(facts=facts(orders))
            code = 0
        else:
            node = Node(orders, speaker, early, announce, prepare(orders))
            node.start()
            code = node.run()
            if node.orphaned:
                return code  # without a last word
    except ValueError as error:
        speaker.say(error=str(error))
    speaker.say(end=code)
    speaker.close()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

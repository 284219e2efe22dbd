"""One generation of a run: the nodes under way, what is heard of each, and that all of them end when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from typing import Any

from funczero.launch.error import LaunchError
from funczero.launch.events import event_of
from funczero.launch.job import Plan
from funczero.launch.processes import die_with_parent, exit_status
from funczero.launch.report import Failure, Report
from funczero.launch.transports import Command, commands_of, own

PATIENCE = 4.5  # seconds that hosts have to end their processes before their connections are cut
NOTICES = (signal.SIGTERM, signal.SIGUSR1)


def start(command: Command, **streams: Any) -> subprocess.Popen:
    """A process that does not outlive this one, in a group of its own so that ctrl-c reaches this one alone."""
    try:
        return subprocess.Popen(
            command.argv,
            env=os.environ | command.env,
            cwd=command.cwd,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            **streams,
        )
    except FileNotFoundError:
        raise LaunchError(
            f"{command.argv[0]} is not installed on this machine; install it, or choose another --launcher"
        ) from None


class Launch:
    """One generation: the nodes under way, what was heard of each, and what went wrong."""

    def __init__(self, plan: Plan, report: Report, inbox: queue.SimpleQueue, restarts: int) -> None:
        self.plan, self.report, self.inbox = plan, report, inbox
        self.host = {node.rank: node.host for node in plan.nodes}
        self.heard: dict[int, float] = {}  # when a node spoke last
        self.ended: dict[int, int] = {}  # codes of the nodes that said that they are through
        self.failures: list[Failure] = []
        self.came: list[int] = []  # signals to this process
        self.ending_since: float | None = None
        self.restarted, self.beat = 0, 0.0
        self.told: set[int] = set()  # connections that have taken their orders
        # what a connection said itself: ssh's complaints, a login script's greeting
        self.words: dict[int, list[str]] = {}
        commands = commands_of(plan._replace(options=plan.options._replace(max_restarts=restarts)))
        self.links = {
            rank: start(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for rank, c in commands.items()
        }
        self.open = set(self.links)
        for rank, c in commands.items():
            if c.stdin:
                threading.Thread(target=self._order, args=(rank, c.stdin), daemon=True).start()
        self.nodes = {node.rank for node in own(plan)}
        for rank, link in self.links.items():
            threading.Thread(target=self._listen, args=(rank, link, link.stdout, link.stderr), daemon=True).start()

    def run(self) -> None:
        """Until every node has ended and every connection is closed."""
        while self.open:
            try:
                node, kind, what = self.inbox.get(timeout=0.2)
                getattr(self, f"_{kind}")(node, what)
            except queue.Empty:
                pass
            self._tick(time.monotonic())
        self.report.release(0.0, everything=not self.failures)

    def code(self) -> int:
        """Of the rank that failed first; prints why."""
        stopped = next((n for n in self.came if n in (signal.SIGINT, signal.SIGHUP)), None)
        if stopped is None and len(self.came) > 1:
            stopped = self.came[-1]
        if stopped is not None:
            self.report.note(f"ended by {signal.Signals(stopped).name}")
            return 128 + stopped
        if self.failures:
            return exit_status(self.report.failed(self.failures).code)
        return max(self.ended.values(), default=1)

    def end(self) -> None:
        """End every node: the end of its input."""
        if self.ending_since is None:
            self.ending_since = time.monotonic()
            for rank in self.links:
                self._close(rank)

    def cut(self) -> None:
        """Give up waiting; a node that still runs ends by itself."""
        for rank in self.open:
            self.links[rank].kill()

    def _tick(self, now: float) -> None:
        self.report.release(now)
        if self.ending_since is not None and now - self.ending_since > PATIENCE:
            return self.cut()
        if now - self.beat > 1.0:
            self.beat = now
            for rank in self.open & self.told:
                self._tell(rank, b"\n")
        silent = [n for n, at in self.heard.items() if n not in self.ended and now - at > self.plan.options.lost_after]
        for node in silent if self.ending_since is None else ():
            self._fail(node, None, 255, f"it has not spoken for {self.plan.options.lost_after:g} seconds", lost=True)

    def _order(self, rank: int, orders: bytes) -> None:
        """A thread each: a host that cannot take its orders does not keep the others waiting."""
        self._tell(rank, orders)
        self.told.add(rank)

    def _tell(self, rank: int, data: bytes) -> None:
        pipe: Any = self.links[rank].stdin
        with contextlib.suppress(OSError, ValueError):  # it has gone; its output says so as well
            pipe.write(data)
            pipe.flush()

    def _close(self, rank: int) -> None:
        if self.plan.options.launcher == "pdsh" and rank < 0:
            self.links[rank].terminate()  # its connections end with it, and so does every node's input
        pipe: Any = self.links[rank].stdin
        with contextlib.suppress(OSError):
            pipe.close()

    def _listen(self, rank: int, link: subprocess.Popen, output: Any, errors: Any) -> None:
        """A thread for each connection: a node's events, and other people's words."""
        other = threading.Thread(target=self._complaints, args=(rank, errors), daemon=True)
        other.start()
        for line in output:
            text = line.decode(errors="replace").rstrip("\n")
            event = event_of(text)
            self.inbox.put((rank, "event", event) if event else (rank, "word", text))
        other.join(1.0)  # why it was closed goes before that it was
        self.inbox.put((rank, "closed", link.wait()))

    def _complaints(self, rank: int, output: Any) -> None:
        for line in output:
            self.inbox.put((rank, "word", line.decode(errors="replace").rstrip("\n")))

    def _signal(self, _: None, number: int) -> None:
        self.came.append(number)
        if number in NOTICES and len(self.came) == 1 and -1 not in self.links:
            self.report.note(f"{signal.Signals(number).name} is passed on to every rank; a second one ends them")
            for rank in self.open:
                self._tell(rank, json.dumps({"signal": number}).encode() + b"\n")
        else:
            self.end()

    def _word(self, rank: int, text: str) -> None:
        lost = re.search(r"pdsh@.*: (\S+): ssh exited with exit code", text) if rank < 0 else None
        if lost:
            for node in self.plan.nodes:
                if (
                    node.host.rpartition("@")[2] == lost[1]
                    and node.rank not in self.ended
                    and self.ending_since is None
                ):
                    self._fail(node.rank, None, 255, "its connection ended", lost=True)
        else:
            self.words.setdefault(rank, []).append(text)
            self.report.lines(self.host.get(rank, "pdsh"), None, [text], True)

    def _closed(self, rank: int, code: int) -> None:
        self.open.discard(rank)
        for node in self.nodes if rank < 0 else {rank}:
            if node not in self.ended and self.ending_since is None:
                said = next(
                    (w for w in reversed(self.words.get(rank, [])) if w.strip()),
                    f"its connection ended with status {exit_status(code)}",
                )
                self._fail(node, None, 255, said, lost=node in self.heard)

    def _event(self, _: int, event: dict) -> None:
        node = event["node"]
        if node not in self.host:
            return  # no node of this run
        self.heard[node] = now = time.monotonic()
        if "lines" in event:
            self.report.lines(self.host[node], event["rank"], event["lines"], event["err"])
        elif "failed" in event:
            self._fail(node, event["failed"], event["code"], "", began=now - event["age"])
        elif "error" in event:
            self._fail(node, None, 1, event["error"])
        elif "restarting" in event:
            self.report.say(
                f"rank {event['restarting']} on {self.host[node]} ended with code {exit_status(event['code'])};"
                " torchrun starts the ranks again"
            )
        elif "born" in event:
            self.restarted = max(self.restarted, event["restart"])
        elif "end" in event:
            self.ended[node] = event["end"]
            if len(self.ended) == len(self.nodes):
                for rank in self.links:
                    self._close(rank)

    def _fail(
        self, node: int, rank: int | None, code: int, why: str, began: float | None = None, lost: bool = False
    ) -> None:
        self.failures.append(
            Failure(time.monotonic() if began is None else began, self.host[node], rank, code, why, lost)
        )
        self.end()

"""Worlds of two ranks that train, save and are killed. They are forked from the process of ends.py, which has imported
everything; a world takes tenths of a second.

What its ranks told is left in `<life>/told.json`. Kills come at a point of a save, which the Checkpointer tells, or
from a clock.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

CHAIN = "3 [grad acc"
QUICK = 2.0  # seconds of silence until a rank is taken for dead, where the product's own 8 would take too long
ALL_PASS = ("asked", "copied", "made", "chunk", "written")  # points that every rank passes by itself
DELETED = ".funczero-deleted"


class Nursery:
    """Worlds forked from the process of an `ends.Ends`."""

    def __init__(self, ends):
        self.ends = ends

    def start(self, place, **life):
        """A world's life in a folder of its own; `told` waits for it."""
        place.mkdir(parents=True, exist_ok=True)
        (place / "told.json").unlink(missing_ok=True)
        self.ends.ask({"place": str(place), **life})

    def told(self, place, within=60.0):
        """By rank what it said: {"events": [...], "ended": how}."""
        stop = time.monotonic() + within
        while not (place / "told.json").exists():
            alive = self.ends.process.poll() is None
            assert time.monotonic() < stop and alive, f"{place}: no word within {within} s"
            time.sleep(0.02)
        return json.loads((place / "told.json").read_text())


@contextmanager
def nursery():
    """One of its own, that is closed at the end."""
    from ends import Ends

    ends = Ends()
    try:
        yield Nursery(ends)
    finally:
        ends.close()


def guardian(life):
    """Start the ranks, kill by the clock where the life says so, and write down how they ended."""
    place = Path(life["place"])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the store says of ranks that are gone; they have files
    for old in (*place.glob("rank*"), *place.glob("stderr*")):
        old.unlink()
    store = place / f"store{time.monotonic_ns()}"
    ranks = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os._exit(one(rank, life, store))
        ranks.append(pid)
    kept = [] if life.get("tcp") else [keep(store)]  # after the forks: it has threads
    if "clock" in life:
        while not all(
            (place / f"rank{r}").exists() and life["after"] in (place / f"rank{r}").read_text() for r in range(2)
        ):
            time.sleep(0.002)
        time.sleep(life["clock"])
        for rank in life["victims"]:
            os.kill(ranks[rank], signal.SIGKILL)
    struck = time.time()
    stopped = life["victims"] if life.get("signal") == "SIGSTOP" else []
    ended, gone = {}, {}
    while len(ended) < 2:
        for r in {0, 1} - ended.keys():
            if len(ended) == 2 - len(stopped) and r in stopped:
                os.kill(ranks[r], signal.SIGKILL)
            if (done := os.waitpid(ranks[r], os.WNOHANG))[0]:
                ended[r], gone[r] = os.waitstatus_to_exitcode(done[1]), time.time()
        time.sleep(0.005)
    lines = [(place / f"rank{r}").read_text().splitlines() if (place / f"rank{r}").exists() else [] for r in range(2)]
    said = [
        (place / f"stderr{r}").read_text(errors="replace")[-8000:] if (place / f"stderr{r}").exists() else ""
        for r in range(2)
    ]
    told = [
        {
            "events": [json.loads(x) for x in lines[r]],
            "ended": ended[r],
            "gone": gone[r],
            "struck": struck,
            "stderr": said[r],
        }
        for r in range(2)
    ]
    (place / "told.new").write_text(json.dumps(told))
    (place / "told.new").rename(place / "told.json")
    kept.clear()
    return 0


def keep(place):
    """A store of this process's, and the file that tells the others its port.

    Why no file as a store: who is killed amid a record of torch's FileStore leaves half of it, and every later question
    of everybody reads at the end of the file for ever, whatever the timeout.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    place.with_suffix(".new").write_text(str(store.port))
    place.with_suffix(".new").rename(place)
    return store


def one(rank, life, store):
    """A rank from its first breath; 0 where its life came to its end."""
    import faulthandler

    import torch.distributed as dist

    place = Path(life["place"])
    os.dup2(
        os.open(place / f"stderr{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2
    )  # gloo's, ours, and where a rank hung
    faulthandler.dump_traceback_later(50, exit=True)
    file = (place / f"rank{rank}").open("a", buffering=1)
    say = lambda what, **more: file.write(json.dumps({"what": what, "at": time.time(), **more}) + "\n")
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo"
    )
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(not life.get("tcp"))  # who holds the store: torchrun says so, too
    try:
        if life.get("tcp") and rank == 0:  # the world's store dies with it
            world = keep(store)
        else:
            while not store.exists():
                time.sleep(0.002)
            world = dist.TCPStore("127.0.0.1", int(store.read_text()), 2, is_master=False)
        dist.init_process_group("gloo", store=world, rank=rank, world_size=2)
        say("joined")
        {"point": at_point, "clock": by_clock}["clock" if "clock" in life else "point"](rank, life, say)
    except BaseException as e:
        say("raised", kind=type(e).__name__, text=str(e))
        traceback.print_exc()  # into stderr0 or stderr1, which is told
        return 1
    return 0


def pulse(life):
    """How long a rank may be silent, as a Checkpointer takes it."""
    return {"silence": QUICK} if life.get("quick", True) else {}


def at_point(rank, life, say):
    """Two updates, a good save, two more, the save in which somebody dies, and one more; or so many updates from the
    latest save on.
    """
    import checkpoints
    import torch.distributed as dist
    import zoo

    from funczero.checkpoint import Checkpointer

    step, t, fatal = checkpoints.make(life.get("chain", CHAIN), 2), 4, Fatal(rank, life, say)
    keep = life.get("keep", 2 if life.get("goes_on") else None)
    ck = Checkpointer(Path(life["place"], "run"), step=step, keep=keep, passing=fatal, **pulse(life))
    if life["point"] == "born":
        if rank in life["victims"]:
            time.sleep(0.5)  # the others have joined as well
            say("dies")
            os.kill(os.getpid(), signal.SIGKILL)
        ck.restore(like=(step, checkpoints.abstract()))
    if life.get("goes_on"):
        found = ck.restore(like=(step, checkpoints.abstract()))
        t = found.step + life["updates"]
        state = checkpoints.train(step, found.state, found.step, t)
    else:
        state = checkpoints.train(step, step.init(zoo.params(), key=7), 0, 2)
        ck.save(state, 2)
        ck.wait()
        state = checkpoints.train(step, state, 2, 4)
    pids = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    if life["point"] in ("absent", "unread"):
        fatal.myself()
        if life["point"] == "unread":
            other = Checkpointer(Path(life["place"], "run"), step=step, **pulse(life))
            other.restore(like=(step, checkpoints.abstract()))
    elif life["point"] != "ends":
        fatal.pids = pids
    say("saves", step=t)
    ck.save(state, 2 if life.get("overwrite") else t, overwrite=bool(life.get("overwrite") or life.get("goes_on")))
    if life["point"] == "ends":
        fatal.myself()
        return say("saved", name=ck.wait())
    while life.get("poll") and ck.poll() is None:
        time.sleep(0.01)
    say("saved", name=ck.wait())
    ck.save(state, "more")
    say("saved", name=ck.wait())


class Fatal:
    """What a Checkpointer calls at the points of a save: at one of them somebody dies, or is stopped, once armed."""

    def __init__(self, rank, life, say):
        self.rank, self.life, self.say = rank, life, say
        self.how = getattr(signal, life.get("signal", "SIGKILL"))
        self.pids, self.chunks = [], 0  # nobody's: not armed

    def __call__(self, point):
        if not self.pids:
            return
        self.chunks += point == "chunk"
        if self.life["point"] == "chunk":  # amid writing, or where there are fewer chunks right after it
            if self.chunks == 4 or point == "written":
                time.sleep(0.05)
                self.myself()
        elif point == self.life["point"]:
            self.myself() if point in ALL_PASS else self.everyone(half=point == "pruning")

    def myself(self):
        """This rank, where it is one of them."""
        if self.rank in self.life["victims"]:
            self.say("dies")
            os.kill(os.getpid(), self.how)

    def everyone(self, half=False):
        """All of them by rank 0's hand, at a point that it passes alone; what it deletes is half gone then."""
        gone = [p for p in Path(self.life["place"], "run").rglob(f"*{DELETED}/**/*") if half and p.is_file()]
        for p in sorted(gone)[: len(gone) // 2]:
            p.unlink()
        for r in sorted(self.life["victims"], reverse=True):
            self.say("dies" if r == self.rank else "kills")
            os.kill(self.pids[r], signal.SIGKILL)


def by_clock(rank, life, say):
    """Go on from the latest, save every other update, until the clock strikes."""
    import checkpoints

    from funczero.checkpoint import Checkpointer

    step = checkpoints.make(life.get("chain", CHAIN), 2)
    ck = Checkpointer(Path(life["place"], "run"), step=step, keep=2, join=3.0, **pulse(life))
    restored = ck.restore(like=(step, checkpoints.abstract()))
    state, t = restored.state, restored.step
    say("trains", step=t)
    while True:
        state = checkpoints.train(step, state, t, t + 1)
        t += 1
        if t % 2 == 0:
            ck.save(state, *(("last",) if t % 4 == 0 else (t,)), overwrite=t % 4 == 0)
            say("saves", step=t)
        ck.poll()

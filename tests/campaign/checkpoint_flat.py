"""Two thousand updates with four hundred saves: does a rank hold more at the end than at the start?

Run: `python tests/campaign/checkpoint_flat.py --updates=2000 --every=5 --ranks=2` (about three minutes on two cores).
Expect: descriptors, sockets, Python threads and files in /dev/shm the same after the first tenth and at the end,
resident memory within 1 %.
Found: all of it, with one arena of malloc (the default here): resident memory grows by 0.20 and 0.89 % since the first
tenth, by 0.08 and 0.04 % in the second half, what malloc has handed out by 0.2 and 2.1 MiB. With --arenas=0, glibc's
own default, by 1.15 and 1.88 %, in the second half -0.33 and 0.41 % (on a loaded machine): over the 1 % that was asked.
Before a save gave back what malloc holds (`memory.give_back`) it was 1.78 and 3.05 %, 0.50 and 0.45 %: threads that
saves start have arenas of their own, up to eight a core, which keep what was freed in them. One thread for all saves
changed nothing. Before the log of
launches was made small (its 16,384 entries took some 3 kB an update until it was full) it was 3.4 and 4.0 %.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import checkpoints  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from funczero.checkpoint import Checkpointer  # noqa: E402


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: what malloc holds, summed over its arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def in_use():
    """MiB that malloc has handed out and not got back; nan where it cannot be asked."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return math.nan
    ask.restype = Mallinfo
    found = ask()
    return round((found.uordblks + found.hblkhd) / 2**20, 1)


def held():
    """What this process holds."""
    gc.collect()
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the listing's own
            continue
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "descriptors": len(links),
        "sockets": sum(x.startswith("socket") for x in links),
        "python threads": threading.active_count(),
        "threads": int(status["Threads"]),
        "shm": len(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else 0,
        "rss MiB": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "in use MiB": in_use(),
    }


def rank_of(directory, out):
    """A rank's run."""
    torch.set_num_threads(1)
    f, size = flags.FLAGS, int(os.environ["WORLD_SIZE"])
    step = checkpoints.make(f.chain, size)
    state, rows, start = step.init(zoo.params(), key=7), [], time.time()
    with Checkpointer(directory, step=step, keep=2) as ck:
        for t in range(f.updates):
            state = checkpoints.train(step, state, t, t + 1)
            if t % f.every == f.every - 1:
                ck.save(state, t + 1, client_state={"t": t, "x": torch.arange(100)})
            ck.poll()
            if (t + 1) % max(1, f.updates // 10) == 0:
                ck.wait()
                rows.append({"updates": t + 1, "seconds": round(time.time() - start, 1), **held()})
    out.write_text(json.dumps(rows))


def main(_):
    """Fork the ranks over a store of rank 0's, and print their tables."""
    logging.set_verbosity(logging.ERROR)
    f = flags.FLAGS
    if f.arenas and os.environ.get("MALLOC_ARENA_MAX") != str(f.arenas):  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_ARENA_MAX": str(f.arenas)})
    place = Path(tempfile.mkdtemp(prefix="funczero-flat-"))
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for rank in range(f.ranks):
        if os.fork() == 0:
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(f.ranks),
                LOCAL_RANK=str(rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                GLOO_SOCKET_IFNAME="lo",
            )
            rank_of(place / "run", place / f"rank{rank}.json")
            sys.exit(0)  # to the interpreter's own end
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(f.ranks)]
    for rank in range(f.ranks):
        rows = json.loads((place / f"rank{rank}.json").read_text())
        print(f"\nrank {rank}\n" + "  ".join(f"{k:>14}" for k in rows[0]))
        for row in rows:
            print("  ".join(f"{x:14}" for x in row.values()))
        first, half, last = rows[0], rows[len(rows) // 2 - 1], rows[-1]
        grown = [100 * (last["rss MiB"] / x["rss MiB"] - 1) for x in (first, half)]
        same = all(first[k] == last[k] for k in ("descriptors", "sockets", "python threads", "shm"))
        print(
            f"rank {rank}: {'flat' if same else 'NOT FLAT'}; resident memory {grown[0]:+.2f} % since the first tenth,"
            f" {grown[1]:+.2f} % since the first half"
        )
    print(f"exit codes {codes}")


if __name__ == "__main__":
    flags.DEFINE_integer("updates", 2000, "how many")
    flags.DEFINE_integer("every", 5, "updates between two saves")
    flags.DEFINE_integer("ranks", 2, "processes")
    flags.DEFINE_integer("arenas", 1, "of malloc, 0: as many as it likes")
    flags.DEFINE_string("chain", "3 [grad acc", "of the zoo")
    app.run(main)

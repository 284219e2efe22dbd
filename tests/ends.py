"""Scripts that come to their end in every way Python has, as ranks of a world with a store of its own. They are forked
from one process that has imported everything.

`python ends.py` reads a life as a line of JSON, {"place", "size", "script", "limit", "short"}, runs the script in every
rank to the very end of its interpreter, and leaves in `<place>/told.json` by rank the exit code, what was printed, the
seconds it took, and when it ended (since the epoch). A rank without RANK in its environment is a world of one. A life
with "victims" is one of kills.py.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 60.0  # seconds, after which a life is ended if it does not say otherwise


class Ends:
    """The process that lives are forked from."""

    def __init__(self):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        env = {k: v for k, v in env.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True, env=env)

    def start(self, place, script, size=1, limit=LIMIT, short=False):
        """A life in a folder of its own; `short` says that the test is not about how it ends (`shortly`)."""
        place.mkdir(parents=True, exist_ok=True)
        self.ask({"place": str(place), "size": size, "script": script, "limit": limit, "short": short})

    def ask(self, life):
        """A life as a line."""
        self.process.stdin.write(json.dumps(life) + "\n")
        self.process.stdin.flush()

    def told(self, place, limit=LIMIT):
        """By rank {"code", "out", "err", "seconds", "when"}."""
        stop = time.monotonic() + limit + 40
        while not (place / "told.json").exists():
            assert time.monotonic() < stop and self.process.poll() is None, f"{place}: no word"
            time.sleep(0.02)
        return json.loads((place / "told.json").read_text())

    def run(self, place, script, size=1, limit=LIMIT, short=False):
        """`start` and `told`."""
        self.start(place, script, size, limit, short)
        return self.told(place, limit)

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.wait(60)


def line(file, *words):
    """A script that runs a file with these words, as a command line would."""
    own = f"import runpy, sys; sys.argv = {[str(file), *words]!r}; sys.path.insert(0, {str(file.parent)!r})"
    return f"{own}; runpy.run_path({str(file)!r}, run_name='__main__')"


def main():
    """The script of a rank that is to be run, in its own process: (its file, whether it ends shortly); None where all
    lines are done.
    """
    import kills
    import orbax.checkpoint  # noqa: F401
    import sympy  # noqa: F401  # which the first update would import
    import torch
    import torch._dynamo  # noqa: F401  # which the first torch.optim and the first torch.utils.checkpoint would import
    import torch.distributed.device_mesh
    import torch.fx.experimental.symbolic_shapes  # noqa: F401
    import zoo  # noqa: F401

    import funczero.deepspeed  # noqa: F401
    import funczero.testing.proven  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # or the end of every interpreter would go through all that is imported here, and copy it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            life = json.loads(line)
            if "victims" in life:
                os._exit(kills.guardian(life))
            script = guardian(life)
            if script is not None:
                return script, life["short"]
            os._exit(0)
    return None


def shortly(run):
    """Call it as an interpreter would run a script, to the end of its threads and of what was registered for its exit.
    Then the system takes back the memory: to free all that was imported takes a rank a third of a second more.
    """
    code = 0
    try:
        run()
    except SystemExit as end:
        said = end.code is not None and not isinstance(end.code, int)
        code = 1 if said else end.code or 0
        if said:
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def guardian(life):
    """Fork the ranks; in each of them its script's file, otherwise None once all have ended."""
    place, size = Path(life["place"]), life["size"]
    (place / "script.py").write_text(life["script"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            if size > 1:
                os.environ.update(
                    RANK=str(rank),
                    WORLD_SIZE=str(size),
                    LOCAL_RANK=str(rank),
                    LOCAL_WORLD_SIZE=str(size),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            for fd, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(place / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
            return place / "script.py"
        ranks.append(pid)
    start, told = time.monotonic(), {}
    while len(told) < size:
        for rank, pid in enumerate(ranks):
            if rank not in told and (done := os.waitpid(pid, os.WNOHANG))[0]:
                told[rank] = {"code": os.waitstatus_to_exitcode(done[1]), "seconds": time.monotonic() - start}
                told[rank]["when"] = time.time()
            elif rank not in told and time.monotonic() - start > life["limit"]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    said = [told[r] | {n: (place / f"{n}{r}").read_text(errors="replace") for n in ("out", "err")} for r in range(size)]
    (place / "told.new").write_text(json.dumps(said))
    (place / "told.new").rename(place / "told.json")
    return None


if __name__ == "__main__":
    to_run = main()
    if to_run is not None:
        file, short = to_run
        run = compile(file.read_text(), file, "exec")
        names = {"__name__": "__main__", "__file__": str(file)}
        if short:
            shortly(lambda: exec(run, names))
        exec(run, names)

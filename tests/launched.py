"""What tests launch: it shows what it was given, and ends as it is told.

Standard library alone, so that it starts at once.
"""

import json
import os
import signal
import subprocess
import sys
import time

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "TORCHELASTIC_RESTART_COUNT",
)


def show() -> None:
    """One line: the arguments, the folder, what the launcher wrote, and what the environment was to carry."""
    env = {name: os.environ.get(name) for name in NAMES} | {
        name: value for name, value in os.environ.items() if name.startswith("FUNCZERO_")
    }
    print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "env": env, "host": os.uname().nodename}), flush=True)


def linger(daemon: bool = False) -> int:
    """Stay, with a child that has left this session; only the end of the tree ends it."""
    if daemon:
        subprocess.Popen(["sleep", "100"], start_new_session=True)
    print("ready", flush=True)
    time.sleep(100)
    return 1


def main() -> int:
    """`show` is all it does without a known first argument."""
    argv, names = sys.argv[1:], ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    rank = next((int(os.environ[name]) for name in names if name in os.environ), 0)
    mode, who = (argv + ["", ""])[:2]
    if mode == "die" and who == str(rank):
        time.sleep(0.2)
        open("died", "w").close()
        raise RuntimeError(f"rank {rank} is unwell")
    if mode == "exit" and who == str(rank):
        return int(argv[2])
    if mode == "kill" and who == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode in ("die", "exit", "kill"):
        linger()
    elif mode == "deaf":  # a rank that SIGTERM does not end, next to one that dies
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank != int(who):
            open("deaf", "w").close()
            linger()
        while not os.path.exists("deaf"):  # until the other one is deaf
            time.sleep(0.05)
        print("going", flush=True)
        return 3
    elif mode == "daemon":
        linger(daemon=True)
    elif mode == "once":  # the first time torchrun starts it, one rank fails and the others wait for it
        show()
        if rank == 0 and not os.path.exists("again"):
            time.sleep(1)
            open("again", "x").close()
            return 7
        return 0 if os.path.exists("again") else linger()
    elif mode == "save":  # a run that is told to end saves and ends
        came = []
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda n, _: came.append(n))
        print("ready", flush=True)
        while not came:
            time.sleep(0.05)
        print(f"saved after {signal.Signals(came[0]).name}", flush=True)
    elif mode == "shrug":  # a traceback that nobody dies of
        try:
            raise ValueError("a small matter")
        except ValueError:
            sys.excepthook(*sys.exc_info())
        print("and on", flush=True)
    else:
        show()
    return 0


if __name__ == "__main__":
    sys.exit(main())

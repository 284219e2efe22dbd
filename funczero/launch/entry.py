"""What torchrun starts as a rank: it ties the process to its agent's life, joins it to its node's pipes, and becomes
the script.

Run by path under `python -I`, without the package: the interpreter's own modules are all it may import.
"""

import ctypes
import json
import os
import signal
import sys


def main(folder: str) -> None:
    """Become the command in folder/command.json; its exit status is then the script's own."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody outlives an agent that was killed
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
    with open(os.path.join(folder, "command.json")) as file:
        orders = json.load(file)
    env, argv = os.environ, list(orders["argv"])
    local = env["LOCAL_RANK"]
    for stream, name in ((1, "out"), (2, "err")):
        pipe = os.open(os.path.join(folder, f"{name}{local}"), os.O_WRONLY)
        os.dup2(pipe, stream)
        os.close(pipe)
    # DeepSpeed's names
    env.update(LOCAL_SIZE=env["LOCAL_WORLD_SIZE"], CROSS_RANK=env["GROUP_RANK"], CROSS_SIZE=env["GROUP_WORLD_SIZE"])
    if orders["local_rank_at"]:
        argv.insert(orders["local_rank_at"], f"--local_rank={local}")
    if orders["bound"]:
        argv = [*orders["bound"][int(local)], *argv]
    told = {
        "local": int(local),
        "rank": int(env["RANK"]),
        "world": int(env["WORLD_SIZE"]),
        "pid": os.getpid(),
        "restart": int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
    }
    pipe = os.open(os.path.join(folder, "born"), os.O_WRONLY)
    os.write(pipe, json.dumps(told).encode() + b"\n")
    os.close(pipe)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(
            f"{argv[0]}: cannot be run ({error.strerror}); name a program, or leave --no_python out for a Python"
            " script",
            file=sys.stderr,
        )
        sys.exit(126)


if __name__ == "__main__":
    main(sys.argv[1])

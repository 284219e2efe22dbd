"""Python that has imported everything: one process does, and what its program is asked to run is forked from it.

Each worker of xdist starts a server that its pools' ranks are forked from, and the process of ends.py, and both begin
by importing the same: torch, orbax, transformers. `begin` starts the process that has it all and gives the path of a
program. `<program> ARGS` is what `python ARGS` is, with the caller's files, folder and environment, but forked from
there; python itself, where that process is gone. Who kills the program kills what it runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys

HIGH = 200  # files that came wait above the numbers that they are to have
BEGUN = b"begun"


def begin(folder, modules):
    """(the process, which ends once its input does, the program's path).

    Raises:
      OSError: the system has no such sockets, or the folder's name is too long for one.
    """
    place, program = os.path.join(folder, "asked"), os.path.join(folder, "python")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(64)
        words = [sys.executable, __file__, "serve", str(listener.fileno()), *modules]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    with open(program, "w") as file:  # -I and -S: it imports next to nothing
        file.write(f"#!/bin/sh\nexec '{sys.executable}' -I -S '{os.path.abspath(__file__)}' ask '{place}' \"$@\"\n")
    os.chmod(program, 0o755)
    return process, program


# --- the program
def ask(place, words):
    """Hand everything over and wait for the end; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(place)
            fds = [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd != s.fileno() and _open(fd)]
            job = json.dumps({"words": words, "env": dict(os.environ), "at": os.getcwd(), "fds": fds}).encode()
            socket.send_fds(s, [struct.pack("q", len(job))], fds)
            s.sendall(job)
            begun = s.recv(len(BEGUN)) == BEGUN
        except OSError:
            begun = False
        if not begun:
            os.execv(sys.executable, [sys.executable, *words])
        for fd in fds:  # others wait for their last holder
            os.close(fd)
        code = s.recv(1)
    return code[0] if code else 1


def _open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# --- the process that has imported
def serve(listener, modules):
    """What to run, in a process of its own; None where nobody will ask any more."""
    import gc
    import importlib

    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # or whoever is forked would go through all of it, and copy it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        if 0 in select.select([0, listener], [], [])[0]:
            return None
        asked = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            return guardian(asked)
        asked.close()


def guardian(asked):
    """Fork who runs it, in which this returns; here tell the program how that ended, or end it with the program."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, fds, _, _ = socket.recv_fds(asked, 8, 250)
    with asked.makefile("rb") as file:
        job = json.loads(file.read(struct.unpack("q", size)[0]))
    pid = os.fork()
    if pid == 0:
        asked.close()
        taken_over(job, fds)
        return job["words"]
    for fd in fds:
        os.close(fd)
    asked.sendall(BEGUN)
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, asked], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # nobody waits for it
        asked.sendall(bytes([code % 256 if code >= 0 else 128 - code]))
    os._exit(0)


def taken_over(job, fds):
    """Become what the program is: files by their numbers, environment, folder, and where python looks for modules."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, HIGH) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(high, job["fds"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["at"])
    after = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[1 : 1 + len(before)] = after


def run(words):
    """As the interpreter would: the options are those that this one was started with, then a program or a script."""
    import types

    while words[0] != "-c" and words[0].startswith("-"):
        words = words[2:] if words[0] in ("-X", "-W") else words[1:]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        name, text, sys.argv, sys.path[0] = "<string>", words[1], ["-c", *words[2:]], ""
    else:
        name, sys.argv, sys.path[0] = words[0], list(words), os.path.dirname(os.path.abspath(words[0]))
        main.__file__ = name
        with open(name) as file:
            text = file.read()
    exec(compile(text, name, "exec", dont_inherit=True), vars(main))


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
    given = serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
    if given is not None:
        run(given)

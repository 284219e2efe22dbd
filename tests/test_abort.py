"""An abort of C++ waits until this process has ended by itself, with its own words, or comes after all."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys

import pytest

from funczero.step.abort import SlowAbort

# The module alone, in a process of its own: the handler is one of the whole process.
PRELUDE = """
import ctypes, importlib.util, os, sys, threading, time
spec = importlib.util.spec_from_file_location("abort", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
terminate = ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev  # what C++ does with an exception that nobody catches

def say(*words):
    print(*words, flush=True)

def later(seconds, fn):
    threading.Timer(seconds, fn).start()
"""
CASES = {
    "nobody is told: the abort comes": (
        "module.SlowAbort(0.0, lambda: False)\nterminate()",
        -signal.SIGABRT,
        "",
    ),
    "a thread ends the process meanwhile": (
        "module.SlowAbort(60.0, lambda: False)\nlater(0.1, lambda: (say('told'), os._exit(3)))\nterminate()",
        3,
        "told\n",
    ),
    "a rank that is told has as long as it needs": (
        """
told = [True]
module.SlowAbort(0.0, lambda: told[0])
later(0.3, lambda: (say('told'), os._exit(3)))
terminate()
""",
        3,
        "told\n",
    ),
    "and where that comes to nothing the abort comes": (
        """
told = [True]
module.SlowAbort(0.0, lambda: told[0])
later(0.1, lambda: (say('not told'), told.clear(), told.append(False)))
terminate()
""",
        -signal.SIGABRT,
        "not told\n",
    ),
    "undone, the handler is asked nothing": (
        "slow = module.SlowAbort(60.0, lambda: say('asked') or True)\nslow.undo()\nterminate()",
        -signal.SIGABRT,
        "",
    ),
    "the handler before it is called after it": (
        """
kind = ctypes.CFUNCTYPE(None)
first = kind(lambda: (say('the one before'), os._exit(4)))
set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
set_terminate(ctypes.cast(first, ctypes.c_void_p))
module.SlowAbort(0.0, lambda: False)
terminate()
""",
        4,
        "the one before\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_abort_waits(tmp_path, name):
    text, code, out = CASES[name]
    path = importlib.util.find_spec("funczero.step.abort").origin
    command = [sys.executable, "-c", PRELUDE + text, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, out), done.stderr


def test_undoing_twice_is_undoing():
    slow = SlowAbort(0.0, lambda: False)
    slow.undo()
    slow.undo()

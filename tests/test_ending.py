"""At the end of a process: work under way is waited for, what was lost is said, and guests leave after all work."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading

import pytest

from funczero.world.ending import Work, finish

# The module alone: what it registers is for a whole process.
PRELUDE = """
import importlib.util, sys, threading, time
spec = importlib.util.spec_from_file_location("ending", sys.argv[1])
ending = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ending)

def say(*words):
    print(*words, flush=True)

class Job(ending.Work):
    def __init__(self, fn, what="the save of step 3"):
        super().__init__("job", what)
        self.work = fn
        self.start()

class Visitor(ending.Guest):
    def __init__(self):
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.start()

    def run(self):
        self.stop.wait()

    def leave(self):
        say("a guest leaves")
        self.stop.set()
        self.join()

def slowly(words):
    time.sleep(0.3)
    say(words)

def failing():
    slowly("fails")
    raise OSError("no space left")
"""
LOST = "funczero: the save of step 3 is lost, though this process ends: OSError: no space left\n"
CASES = {
    "work under way is waited for": ("Job(lambda: slowly('done'))\nsay('end')", 0, "end\ndone\n", ""),
    "guests leave after all work": (
        "Visitor(); Job(lambda: slowly('done'))\nsay('end')",
        0,
        "end\ndone\na guest leaves\n",
        "",
    ),
    "what was lost is said, and the process has failed": ("Job(failing)\nsay('end')", 1, "end\nfails\n", LOST),
    "an error that somebody was told is not said again": (
        "job = Job(failing)\ntry:\n    job.result()\nexcept OSError as e:\n    say('told', e)",
        0,
        "fails\ntold no space left\n",
        "",
    ),
    "one that was told and one that was not": (
        (
            "job = Job(failing, 'the save of step 2')\nother = Job(failing)\n"
            "try:\n    job.result()\nexcept OSError:\n    say('told')"
        ),
        1,
        None,
        LOST,
    ),
    "pools of threads still work while it is waited for": (
        (
            "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1)\n"
            "Job(lambda: (time.sleep(0.3), say(pool.submit(lambda: 'pooled').result())))\nsay('end')"
        ),
        0,
        "end\npooled\n",
        "",
    ),
    "an error of the script is shown, and work is waited for": (
        "Job(lambda: slowly('done'))\nraise SystemExit(3)",
        3,
        "done\n",
        "",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_process_ends(name):
    text, code, out, err = CASES[name]
    path = importlib.util.find_spec("funczero.world.ending").origin
    done = subprocess.run([sys.executable, "-c", PRELUDE + text, path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, err) and (out is None or done.stdout == out), done


# --- work by itself ---------------------------------------------------------------------------------------------------
class Job(Work):
    """Waits, then gives or raises."""

    def __init__(self, error=None):
        super().__init__("job", "this job")
        self.go, self.fails = threading.Event(), error

    def work(self):
        self.go.wait()
        if self.fails is not None:
            raise self.fails


def test_a_result_is_waited_for_and_an_error_is_raised_to_whoever_asks():
    good, bad = Job(), Job(OSError("no space left"))
    for job in (good, bad):
        job.start()
        assert not job.ended.is_set()
        job.go.set()
    good.result()
    for _ in range(2):
        with pytest.raises(OSError, match="no space left"):
            bad.result()
    good.join(), bad.join()
    assert good.ended.is_set() and bad.told.is_set() and good.error is None


def test_a_process_that_ends_at_once_is_told_what_is_lost_once(capfd):
    jobs = [Job(), Job(OSError("no space left")), Job(ValueError("told"))]
    for job in jobs:
        job.go.set()
        job.start()
    with pytest.raises(ValueError, match="told"):
        jobs[2].result()
    assert finish() == ["this job"] and finish() == []
    for job in jobs:
        job.join()
    said = capfd.readouterr().err
    assert said == "funczero: this job is lost, though this process ends: OSError: no space left\n"

"""What is forked from a process that has imported is what python would be."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile

import pytest
import warm

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the system cannot wait for a process by a file")
ASK = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['X'], __name__, sys.stdin.read(), sys.path[0])"
ENDS = {
    "a text": ["-c", ASK, "a", "b c"],
    "with options": ["-B", "-W", "error", "-X", "utf8", "-c", ASK],
    "a script": ["asks.py", "a"],
    "a code": ["-c", "raise SystemExit(3)"],
    "an error": ["-c", "import sys; print('out', flush=True); 1 / 0"],
    "a signal": ["-c", "import os; os.kill(os.getpid(), 9)"],
    "an imported name": ["-c", "import json; from __main__ import json as same; print(json is same)"],
}


@pytest.fixture(scope="module")
def program():
    with tempfile.TemporaryDirectory() as folder:
        process, path = warm.begin(folder, ["json"])
        yield path
        process.stdin.close()
        process.wait(30)


@pytest.mark.parametrize("kind", ENDS)
def test_a_run_of_the_program_is_one_of_python(program, tmp_path, kind):
    """Words, folder, environment, input, what is printed, and the end; a signal is told as a shell does."""
    (tmp_path / "asks.py").write_text(ASK)
    own = {"input": "given", "capture_output": True, "text": True, "cwd": tmp_path, "env": {**os.environ, "X": kind}}
    ours, theirs = (subprocess.run([python, *ENDS[kind]], timeout=60, **own) for python in (program, sys.executable))
    assert ours.stdout == theirs.stdout
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]
    assert ours.returncode == (theirs.returncode if theirs.returncode >= 0 else 128 - theirs.returncode)


def test_open_files_keep_their_numbers_and_the_program_holds_none(program):
    read, write = os.pipe()
    os.set_inheritable(write, True)
    own = f"import os, sys; os.write({write}, b'word'); os.close({write}); sys.stdin.read()"
    held = subprocess.Popen([program, "-c", own], stdin=subprocess.PIPE, pass_fds=[write])
    os.close(write)
    assert (os.read(read, 9), os.read(read, 9)) == (b"word", b"")
    held.stdin.close()
    assert held.wait(30) == 0
    os.close(read)


def test_who_kills_the_program_kills_what_it_runs(program):
    own = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    held = subprocess.Popen([program, "-c", own], stdout=subprocess.PIPE, text=True)
    number = int(held.stdout.readline())
    assert number != held.pid
    lives = os.pidfd_open(number)
    held.kill()
    assert held.wait(30) == -9
    assert select.select([lives], [], [], 30.0)[0]
    os.close(lives)
    held.stdout.close()


def test_where_that_process_is_gone_it_is_python():
    with tempfile.TemporaryDirectory() as folder:
        process, path = warm.begin(folder, [])
        process.stdin.close()
        assert process.wait(30) == 0
        run = subprocess.run([path, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        assert run.stdout.strip().isdigit() and run.returncode == 0

"""Saving leaks nothing: descriptors, threads and connections are made once, whatever the number of saves, checkpointers
and restores.
"""

from __future__ import annotations

import json

import pytest

SAVES = """
import gc, json, os, threading
import checkpoints, zoo
from funczero.checkpoint import Checkpointer
SIZE = int(os.environ.get("WORLD_SIZE", 1))

def held():
    gc.collect()
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
        except OSError:  # the listing's own
            continue
    threads = {"threads": len(os.listdir("/proc/self/task")), "python's": threading.active_count()}
    return {"sockets": links.count("socket"), "descriptors": len(links), **threads}

step = checkpoints.make("3 [grad acc", SIZE, check=0)
state, out = step.init(zoo.params(), key=7), []
with Checkpointer({directory!r}, step=step, keep=1) as ck:
    for i in range({saves}):
        ck.save(state, i, client_state={"i": i})
        ck.wait()
        if i == {saves} // 2:
            ck.restore(like=state)
            ck.names()
            out.append(held())
out.append(held())
for i in range(3):
    with Checkpointer({directory!r}, keep=1) as other:
        other.save(state, f"other{i}")
        other.wait()
        other.restore(like=state)
print(json.dumps([*out, held()]))
"""


@pytest.mark.parametrize(
    ("size", "saves"), [(2, 16), *(pytest.param(size, 40, marks=pytest.mark.slow) for size in (1, 2))]
)
def test_all_saves_hold_as_much_as_half_of_them(ends, tmp_path, size, saves):
    """The store is rank 0's."""
    script = SAVES.replace("{directory!r}", repr(str(tmp_path / "run"))).replace("{saves}", str(saves))
    for told in ends.run(tmp_path / "life", script, size, short=True):
        assert told["code"] == 0, told
        half, whole, others = json.loads(told["out"])
        native = [x.pop("threads") for x in (half, whole, others)]  # of pools that grow up to a size
        held = (half, whole, others)
        assert all(later[what] <= half[what] for later in held for what in half), held
        assert half["python's"] == size, held  # the main thread, and the pulse
        assert max(native) - native[0] < 8, native  # and not one a save

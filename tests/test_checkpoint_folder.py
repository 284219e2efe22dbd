"""What else lies in a folder of checkpoints, what is damaged there, and what is not finite: named, left alone, and
never in the way of the next save.
"""

from __future__ import annotations

import logging
import os

import checkpoints
import pytest
import torch
import torch.distributed as dist
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from funczero.checkpoint import Checkpointer, CheckpointError, folder
from funczero.checkpoint.names import escape, named, unescape
from funczero.checkpoint.tools import inspect


class Lines(logging.Handler):
    """What absl's log is told inside the block, on whatever thread."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("absl").addHandler(self)
        return self.lines

    def __exit__(self, *error):
        logging.getLogger("absl").removeHandler(self)


def names(directory):
    return [e.path.name for e in folder.listing(directory).entries]


# what is not ours


def linked(directory):
    (directory.parent / "elsewhere").mkdir()
    os.symlink(directory.parent / "elsewhere", directory / "x.orbax-checkpoint-tmp")


def link_to_a_checkpoint(directory):
    (directory / "1").rename(directory.parent / "moved")
    os.symlink(directory.parent / "moved", directory / "1")


STRANGE = {
    "a file like orbax's temporary folder": lambda d: (d / "x.orbax-checkpoint-tmp").write_text("mine"),
    "a link like orbax's temporary folder": linked,
    "a broken link like orbax's temporary folder": lambda d: os.symlink("nowhere", d / "x.orbax-checkpoint-tmp"),
    "a file like a deleted one": lambda d: (d / "1.funczero-deleted").write_text("mine"),
    "a link like a deleted one": lambda d: os.symlink("nowhere", d / "1.funczero-deleted"),
    "a file like one written beside": lambda d: (d / "1.funczero-new").write_text("mine"),
    "a folder like one written beside": lambda d: (d / "1.funczero-new").mkdir(),
    "a link like one written beside": lambda d: os.symlink("1", d / "1.funczero-new"),
    "a linked checkpoint": link_to_a_checkpoint,
    "a file": lambda d: (d / "notes").write_text("mine"),
}


def untouched(path):
    """What stays the same of a thing that is only looked at."""
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_not_ours_is_left_alone_and_named_and_saves_go_on(tmp_path, strange):
    directory = tmp_path / "run"
    step, state = checkpoints.tiny(w=torch.ones(3))
    with Lines() as lines, Checkpointer(directory, keep=2) as ck:
        ck.save(state, 1)
        ck.wait()
        before = {p.name for p in directory.iterdir()}
        STRANGE[strange](directory)
        (new,) = {p.name for p in directory.iterdir()} - before or {"1"}
        was = untouched(directory / new)
        for name in (2, 3, 4):
            ck.save(state, name)
            assert ck.wait() == str(name)
    assert untouched(directory / new) == was
    assert [x for x in names(directory) if x != "1"] == ["3", "4"] and ("1" in names(directory)) == (
        strange == "a linked checkpoint"
    )
    assert strange == "a file" or [new in line and "left alone" in line for line in lines] == [
        True
    ], lines  # once, not at every save
    assert Checkpointer(directory).restore(like=state).name == "4"


@pytest.mark.parametrize("there", ["link", "broken link", "file", "folder of other things"])
def test_overwriting_replaces_checkpoints_alone(tmp_path, there):
    step, state = checkpoints.tiny(w=torch.ones(3))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    directory = tmp_path / "run"
    directory.mkdir()
    {
        "link": lambda p: os.symlink(tmp_path / "mine", p),
        "broken link": lambda p: os.symlink("nowhere", p),
        "file": lambda p: p.write_text("mine"),
        "folder of other things": lambda p: (tmp_path / "mine").rename(p),
    }[there](directory / "7")
    ck = Checkpointer(directory)
    for overwrite, why in (
        (False, "is there already"),
        (True, "is no checkpoint but a link, a file or a folder of other things"),
    ):
        with pytest.raises(FileExistsError, match=why):
            ck.save(state, 7, overwrite=overwrite)
    ck.save(state, 8)
    assert ck.wait() == "8" and names(directory) == ["8"] and (directory / "7").lstat()


# what is damaged


def damage(path):
    """Bytes that no seal check reads are left; a file is cut."""
    file = max((p for p in path.rglob("*") if p.is_file() and p.parent.name == "d"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("keep", [1, 2])
def test_keep_counts_whole_checkpoints_and_never_takes_the_last_good_one(tmp_path, keep):
    step, state = checkpoints.tiny(w=torch.ones(300))
    with Lines() as lines, Checkpointer(tmp_path, keep=keep) as ck:
        for name in (1, 2, 3):
            ck.save(state, name)
        ck.wait()
        good = names(tmp_path)[-1]
        for name in (4, 5):  # each is damaged before the next one is saved
            ck.save(state, name)
            ck.wait()
            damage(tmp_path / str(name))
        (tmp_path / "4").exists() and damage(tmp_path / "4")
        if keep == 2:
            assert good in names(tmp_path)  # of the three newest two are damaged
            with pytest.raises(CheckpointError, match="/5'"):
                ck.restore(like=state)
            assert ck.restore(like=state, fallback=True).name == good
        ck.save(state, 6)
        ck.save(state, 7)
        ck.wait()
        assert names(tmp_path) == (
            ["7"] if keep == 1 else ["6", "7"]
        )  # once enough are whole, the damaged ones go, too
    assert any("is damaged and does not count" in line for line in lines) or keep == 1
    assert Checkpointer(tmp_path).restore(like=state).name == "7"


# what is not finite


def not_finite(directory, size, stage, where, value):
    """A save after a leaf was spoiled on the last rank; what its log was told."""
    step = checkpoints.make(stage, size, check=0)
    state = checkpoints.train(step, step.init(zoo.params(), key=7), 0, 1)
    part = named(state).parts[where]
    if part.value.numel() and (not dist.is_initialized() or dist.get_rank() == size - 1):
        part.value.view(-1)[-1] = value
    with Lines() as lines, Checkpointer(directory, step=step) as ck:
        ck.save(state, 1)
        assert ck.wait() == "1"
        found = ck.restore(like=state)
    return [x for x in lines if "not finite" in x and x.startswith("save")], found.notes


ODD = [
    ("params/embed", float("nan"), True),
    ("adamw/nu/blocks/1/w", float("nan"), True),
    ("params/embed", float("-inf"), True),
    ("adamw/nu/blocks/1/w", float("inf"), False),
    ("params/embed", 3e38, False),
]


@pytest.mark.parametrize(
    ("where", "value", "said", "stage"),
    [
        pytest.param(*odd, stage, marks=() if i % 2 == j else pytest.mark.slow)
        for i, odd in enumerate(ODD)
        for j, stage in enumerate(("3 [grad acc", "0 grad acc ar"))
    ],
)
def test_what_is_not_finite_is_saved_with_a_warning_on_all_ranks(run_world, tmp_path, stage, where, value, said):
    """NaN anywhere, infinity among the parameters; large sums of finite values are no sign of either."""
    alone = not_finite(tmp_path / "1", 1, stage, where, value)
    both = run_world(2, not_finite, tmp_path / "2", 2, stage, where, value)
    for told, notes in (alone, *both):
        assert [
            f"save '1': {where!r} is not finite in the state at step 1, which was saved as it is" == x for x in told
        ] == [True] * said, told
        assert any(where in n for n in notes) == said
    for world in "12":
        assert (f"not finite: {where}" in inspect(tmp_path / world)) == said


@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "int64", "bool"]
)
def test_every_dtype_is_looked_at(dtype):
    from funczero.checkpoint.saving import sound

    x = torch.ones(5).to(getattr(torch, dtype))
    assert sound(x, True) and sound(x[:0], True)
    if x.is_floating_point() or x.is_complex():
        x[3] = float("nan")
        assert not sound(x, True) and not sound(x, False)
    if dtype in ("float16", "bfloat16", "float64"):
        big = torch.full((70_000,), torch.finfo(x.dtype).max, dtype=x.dtype)
        assert sound(big, True)
        big[7] = float("inf")
        assert not sound(big, True) and sound(big, False)


# names

key = st.text(st.characters(codec=None), max_size=6) | st.sampled_from(
    [
        "..",
        ".",
        "\\",
        "a\\b",
        "/",
        "//",
        "%",
        "%2F",
        "\ud800",
        "a/B1",
        "\x00",
        "\x1b[2J",
        "../x",
        "c",
        "$array",
        "x.funczero-new",
    ]
)


@given(key)
def test_an_escaped_name_is_a_name_and_comes_back(text):
    one = escape(text)
    assert one and not set(one) & set("/\\\x00") and one != ".." and unescape(one) == text
    one.encode()


@settings(max_examples=25)
@given(
    st.dictionaries(key, st.integers(1, 3), min_size=1, max_size=4), st.dictionaries(key, st.integers(0, 2), max_size=4)
)
def test_whatever_is_saved_is_restored(tmp_path_factory, params, client):
    """Keys of parameters and of the client's arrays; what could not be is refused by the save."""
    directory = tmp_path_factory.mktemp("keys")
    params = {k: torch.full((n,), float(n)) for k, n in params.items()}
    client = {k: torch.arange(n) for k, n in client.items()} | {
        "deep": {"..": [torch.ones(1), {"\\": b"x" * 5000, "n": 7**2000}]}
    }
    step, _ = checkpoints.tiny(x=torch.zeros(1))
    state = step.init(params)
    with Checkpointer(directory) as ck:
        try:
            ck.save(state, 1, client_state=client)
        except ValueError as e:
            assert "would both be stored" in str(e) or "names begin with it" in str(e)
            return
        got = ck.restore(like=(step, params))
    assert {k: v.tolist() for k, v in step.params(got.state).items()} == {k: v.tolist() for k, v in params.items()}
    assert got.client_state["deep"][".."][1] == client["deep"][".."][1]
    assert {k: v.tolist() for k, v in got.client_state.items() if k != "deep"} == {
        k: v.tolist() for k, v in client.items() if k != "deep"
    }


@pytest.mark.parametrize(
    "bad, kind, why",
    [
        pytest.param(
            dict(client_state=[[[]] * 3_000_000]),
            CheckpointError,
            "values, more than .* as tensors or numpy arrays",
            marks=pytest.mark.slow,
        ),
        (dict(client_state={"x": "y" * (65 << 20)}), CheckpointError, "bytes, more than"),
        (dict(client_state={"k" * 3000: torch.ones(1)}), ValueError, "name of 3007 characters, more than 2048"),
        (dict(metrics={"loss": 10**400}), ValueError, "metric 'loss' is an integer beyond float64"),
        (dict(metrics={"loss": None}), ValueError, "metric 'loss' is None"),
    ],
)
def test_what_could_not_be_restored_is_refused_when_it_is_saved(tmp_path, bad, kind, why):
    _, state = checkpoints.tiny(w=torch.ones(3))
    ck = Checkpointer(tmp_path)
    with pytest.raises(kind, match=why):
        ck.save(state, 1, **bad)
        ck.wait()
    assert names(tmp_path) == []
    ck.save(state, 2)
    assert ck.wait() == "2"


def test_a_client_state_that_is_too_deep_is_refused_by_its_path(tmp_path):
    _, state = checkpoints.tiny(w=torch.ones(3))
    deep = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(
        TypeError, match="'client/x/0/0/0/0' of the client state has lists and dicts more than 100 deep"
    ):
        Checkpointer(tmp_path).save(state, 1, client_state={"x": deep})

"""Batches are pure functions; the split is by file; what is wrong with the text is said in one sentence."""

import math

import pytest
import torch

from funczero import data


@pytest.fixture
def folder(tmp_path):
    """Sixty files with different text, and files that must not be read."""
    for i in range(60):
        file = tmp_path / f"part{i % 3}" / f"f{i}{'.py' if i % 2 else '.txt'}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(f"<{i}>".encode() * (i + 1))
    (tmp_path / "image.png").write_bytes(b"no text")
    (tmp_path / "empty.py").write_bytes(b"")
    for skipped in ("__pycache__", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "x.py").write_bytes(b"no source")
    return tmp_path


def whole(corpus):
    return data.read(corpus, [0], len(corpus))[0].tobytes()


def test_a_folder_is_its_sources_in_order(folder):
    files = data.text_files([folder])
    names = [piece.name for piece in files]
    assert (
        len(names) == 60 and names == sorted(names) and all(piece.stop == piece.path.stat().st_size for piece in files)
    )


def test_a_file_is_taken_whatever_its_suffix_and_only_once(folder):
    assert [piece.name for piece in data.text_files([folder / "image.png", folder / "image.png"])] == ["image.png"]
    assert len(data.text_files([folder / "part0" / "f0.txt", folder])) == 60


def test_the_split_is_by_file_and_keeps_all_bytes(folder):
    train, held_out = data.load([folder])
    left, right = ({piece.path for piece in corpus.pieces} for corpus in (train, held_out))
    assert left and right and not left & right and len(left | right) == 60
    assert len(train) + len(held_out) == sum(piece.stop for piece in data.text_files([folder]))
    assert whole(held_out) == b"".join(piece.path.read_bytes() for piece in held_out.pieces)


def test_the_split_depends_on_names_alone(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for piece in data.text_files([folder]):
        (elsewhere / piece.name).parent.mkdir(exist_ok=True)
        (elsewhere / piece.name).write_bytes(b"other text")
    (elsewhere / "one_more.py").write_bytes(b"text")
    held_out, there = ({piece.name for piece in data.load([path])[1].pieces} for path in (folder, elsewhere))
    assert there - {"one_more.py"} == held_out


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_no_side_is_ever_empty(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.txt").write_bytes(b"text")
    assert all(len(corpus) for corpus in data.load([tmp_path]))


def test_a_lone_file_gives_its_tail(tmp_path):
    (tmp_path / "lone").write_bytes(bytes(range(100)))
    train, held_out = data.load([tmp_path / "lone"])
    assert (whole(train), whole(held_out)) == (bytes(range(95)), bytes(range(95, 100)))
    assert data.batch(held_out, 0, 0, 8, 4)["x"].tolist() == [[95, 96, 97, 98]] * 8


@pytest.mark.slow
def test_python_itself_is_the_default():
    train, held_out = data.load()
    assert len(train) > 10 * len(held_out) > 1e6 and all(
        "site-packages" not in piece.path.parts for piece in train.pieces
    )
    assert 4 < data.unigram_entropy(held_out) < 5.5


def test_batches_are_pure_functions_of_seed_and_step(folder):
    train, _ = data.load([folder])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, step, seed = (data.batch(train, *at, 4, 16) for at in ((0, 7), (0, 7), (0, 8), (1, 7)))
    assert (
        torch.equal(one["x"], same["x"])
        and torch.equal(one["y"], same["y"])
        and torch.equal(torch.get_rng_state(), state)
    )
    assert not torch.equal(one["x"], step["x"]) and not torch.equal(one["x"], seed["x"])
    assert one["x"].shape == one["y"].shape == (4, 16) and one["x"].dtype == one["y"].dtype == torch.int64
    assert torch.equal(one["x"][:, 1:], one["y"][:, :-1]) and one["x"].is_contiguous() and one["y"].is_contiguous()


def test_windows_begin_at_every_place(tmp_path):
    (tmp_path / "lone").write_bytes(bytes(range(100)))
    train, _ = data.load([tmp_path / "lone"])
    assert set(data.batch(train, 0, 0, 2_000, 4)["x"][:, 0].tolist()) == set(range(95 - 4))


def test_a_window_runs_over_short_files(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([i]) * (1 + i % 2))
    train, _ = data.load([tmp_path])
    text = whole(train)
    assert text == b"".join(piece.path.read_bytes() for piece in train.pieces)
    assert [row.tobytes() for row in data.read(train, [0, 5, len(text) - 7], 7)] == [text[:7], text[5:12], text[-7:]]


def test_held_out_batches_are_spread_and_fixed(folder):
    _, held_out = data.load([folder])
    once, again = (list(data.sample_batches(held_out, 3, 2, 8)) for _ in range(2))
    assert len(once) == 3 and all(torch.equal(a["y"], b["y"]) for a, b in zip(once, again, strict=True))
    text = whole(held_out)
    assert bytes(once[0]["x"][0].tolist()) == text[:8] and bytes(once[-1]["y"][-1].tolist()) == text[-8:]


def test_unigram_entropy(tmp_path):
    (tmp_path / "uniform").write_bytes(bytes(range(256)) * 3)
    (tmp_path / "constant").write_bytes(b"a" * 50)
    (tmp_path / "biased").write_bytes(b"aaab")

    def entropy(*names):
        return data.unigram_entropy(data.Corpus(tuple(data.text_files([tmp_path / name for name in names]))))

    assert entropy("uniform") == 8 and entropy("constant") == 0
    assert math.isclose(entropy("biased"), 2 - 0.75 * math.log2(3))
    assert 0 < entropy("constant", "biased") < entropy("biased")


def test_errors_name_the_path_and_the_remedy(tmp_path):
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "nothing.txt").write_bytes(b"")
    (tmp_path / "byte.txt").write_bytes(b"x")
    (tmp_path / "short.txt").write_bytes(b"some text")
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*/missing'; give a text file"):
        data.load([tmp_path / "missing"])
    with pytest.raises(ValueError, match=r"nothing.txt' holds no text; give"):
        data.load([tmp_path / "nothing.txt"])
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"sub' holds no text; give .* \.py or \.txt files"):
        data.load([tmp_path / "sub"])
    with pytest.raises(ValueError, match=r"byte.txt' holds one byte, .*; give more text"):
        data.load([tmp_path / "byte.txt"])
    with pytest.raises(
        ValueError, match=r"short.txt' on holds 8 bytes, but a window is 9; give more text or a shorter length"
    ):
        data.batch(data.load([tmp_path / "short.txt"])[0], 0, 0, 2, 8)

"""`funczero report`: what a folder tells stands on the page, what is broken is told by its line, and the page asks
nothing of anybody.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from recorded import BEGIN, folder, update

from funczero.cli import main
from funczero.report.compare import difference
from funczero.report.kept import Kept
from funczero.report.lines import Lines
from funczero.report.page import page
from funczero.report.series import HELD, Series

HARD = '</script><b>"&\u2028'
SKIP = {"kind": "skip", "time": 1.7e9, "update": 7, "words": "the gradient of 'w' is not finite on rank 1"}
SKIP |= {"leaf": "w", "rank": 1, "searching": True}
END = {"kind": "end", "time": 1.7e9, "update": 40, "how": "finished", "words": ""}


class Checked(HTMLParser):
    """Tags that are closed in order, what they point to, and the words between them."""

    EMPTY = ("meta", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.points, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.points += [x for name, x in attrs if name in ("href", "src", "srcset", "action", "data", "poster")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.points += [x for name, x in attrs if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)


def two(tmp_path):
    """A run with a skip, a resume and a name that would end a script; one that differs from it at update 20."""
    events = [SKIP, {"kind": "checkpoint", "time": 1.7e9, "name": "20", "update": 20}]
    flags = {"note": [HARD, True], **BEGIN["flags"]}
    events += [BEGIN | {"update": 20, "before": "20", "flags": flags}, END]
    skipped = {7: {"ok": False, "grad_norm": float("inf")}}
    one = folder(tmp_path / "one", events=events, begin={"flags": flags}, odd=skipped)
    return one, folder(tmp_path / "two<i>", odd=skipped | {20: {"loss": 0.25}})


def test_the_page_says_what_the_folders_hold(tmp_path):
    one, other = two(tmp_path)
    runs = [Kept(one, HARD), Kept(other, "two")]
    text = page(runs)
    seen = Checked(text)
    words = " ".join(seen.words)
    for there in (
        "finished",
        "no end is written",
        "update 20 (19 is the last that is the same): loss 0.19047619047619047 and 0.25",
        "note: </script>",
        "the gradient of 'w' is not finite on rank 1; the loss scale is lowered",
        "resumed from checkpoint 20",
        "planned at the peak of an update",
        "counted at rest",
        "train_step on data=2",
        "data=2",
        "20 not in the folder any more",
        "all_gather float32 100 100 0",
    ):
        assert there in words, there
    assert 'title="update 7 skipped: the gradient of' in text and 'title="update 7: inf"' in text
    assert text.count("resumed after update 20") > 2
    assert set(seen.points) == {"data:,"} and not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert text.count("<script") == 2 and "<b>\"" not in text
    numbers = json.loads(re.search(r'id="numbers">(.*?)</script>', text, re.DOTALL)[1])
    assert numbers["runs"][0] == HARD and numbers["charts"][0]["lines"][0]["x"][-1] == 40


def test_what_is_broken_is_told_by_its_line(tmp_path):
    run = folder(tmp_path / "run", updates=3, plan=None)
    with (run / "metrics.jsonl").open("ab") as file:
        odd = [b"", b"[1]", b'{"step": true, "loss": 1}', b'{"step": 2, "loss": 1}', b"\xff\xfe", b"[" * 100_000]
        odd += [b'{"step": 4, "loss": 1e999, "lr": "0.1", "big": 1' + b"0" * 400 + b"}", b'{"step": 5, "loss": "x"}']
        odd += [b'{"step": 6, "loss": 1, "x": ' + b"1" * (1 << 21) + b"}", b'{"step": 7, "loss": null}', b'{"step": 8']
        file.write(b"\n".join(odd))
    with (run / "run.jsonl").open("a") as file:
        file.write('{"kind": "skip"}\n{"kind": "dance", "time": 1}\n{"kind": "sent", "update": 1, "bytes": [[1]]}\n')
        file.write(json.dumps({**BEGIN, "update": -1}) + "\n")
    kept = Kept(run, "run")
    told = "\n".join(kept.troubles())
    for number, why in {
        5: "empty",
        6: "no JSON object",
        7: "no number of updates called step",
        8: "update 2 after update 3",
        9: "no JSON",
        10: "no JSON",
        11: "'lr' is '0.1', no number",
        12: "'loss' is 'x', no number",
        13: "longer than",
        14: "'loss' is None, no number",
    }.items():
        assert f"metrics.jsonl:{number}: {why}" in told, (number, told)
    assert "metrics.jsonl: its last line is half-written" in told
    assert [f"run.jsonl:{n}: no line of kind" in told for n in (4, 5, 6, 7)] == [True] * 4
    assert kept.numbers.last == 7 and kept.numbers.updates["big"].odd[0] == (4, float("inf"))
    text = page([kept])
    Checked(text)
    assert "metrics.jsonl:9: no JSON" in text and "not planned: there is no plan.json" in text
    assert "At the peak: not planned" in text


@pytest.mark.parametrize("content", ["", "\n\n", '{"step": 1', '{"step": 0, "held": NaN}\n'], ids=range(4))
def test_a_folder_that_tells_little_has_a_page(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    Checked(page([Kept(tmp_path, "bare")]))


def test_numbers_out_of_range_are_drawn(tmp_path):
    far = [1.7e308, -1.7e308, 5e-324, 0.0, float("nan"), float("-inf"), 10**350, -(2**60)]
    odd = {n: {"loss": x, "grad_norm": 5e-324 if n % 2 else 1.7e308} for n, x in enumerate(far, 1)}
    text = page([Kept(folder(tmp_path, updates=8, odd=odd), "far")])
    Checked(text)
    assert not re.search(r"(?:left|top):(?:nan|-?inf|-\d{4})", text) and 'd="M0 nan' not in text


def test_no_run_is_one_sentence(tmp_path, capsys):
    folder(tmp_path / "run")
    for words, why in (
        (["report", f"{tmp_path}/no"], "is no folder; write the --out of a run"),
        (["watch", f"{tmp_path}"], "holds no metrics.jsonl, so it is no run's folder"),
        (["report", f"{tmp_path}/run", f"--out={tmp_path}/no/page.html"], "cannot be written (No such file"),
        (["watch", f"{tmp_path}/run", "--every=nan"], "--every=nan is no number of seconds"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1
    assert main(["report", f"{tmp_path}/run", f"{tmp_path}/run", f"--out={tmp_path}/page.html"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/page.html (")


@hypothesis.given(st.lists(st.floats(width=32), min_size=1, max_size=60), st.integers(1, 400), st.integers(0, 2**31))
@hypothesis.settings(max_examples=30)
def test_a_thinned_curve_keeps_every_extreme(hard, pieces, seed):
    draw = np.random.default_rng(seed)
    y = draw.standard_normal(3 * HELD)
    y[draw.integers(0, len(y), len(hard))] = hard
    series = Series()
    for part in np.array_split(np.arange(1, len(y) + 1), pieces):
        series.add(part, y[part - 1])
    x, kept = series.points()
    finite = y[np.isfinite(y)]
    assert (kept.min(), kept.max()) == (finite.min(), finite.max()) == (series.low, series.high)
    assert len(x) <= 1600 and (np.diff(x) > 0).all() and (y[x.astype(int) - 1] == kept).all()
    assert series.odds == len(y) - len(finite) == len(series.odd) and series.count == len(finite)
    for a, b in ((0, HELD), (HELD, 3 * HELD)):  # a stretch of many buckets
        own = y[a:b][np.isfinite(y[a:b])]
        inside = kept[(x > a) & (x <= b)]
        assert inside.max() == own.max() and inside.min() == own.min()


@hypothesis.given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=6))
def test_a_file_that_is_read_in_pieces_is_the_file(tmp_path_factory, odd, cuts):
    whole = b'{"step": 1}\n' + odd + b'\n{"step": 2}\n{"ste'
    path = tmp_path_factory.getbasetemp() / "pieces.jsonl"
    path.unlink(missing_ok=True)
    slow, found = Lines(path), []
    with path.open("ab", buffering=0) as file:
        for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(whole)], strict=True):
            file.write(whole[a:b])
            found += slow.new()
    at_once = Lines(path)
    assert list(at_once.new()) == found and at_once.told() == slow.told() and at_once.half == slow.half


SAME = [update(n) for n in range(1, 6)]
PARTED = {
    "nothing": (SAME, SAME, "the same bits in all 5 updates that both logged"),
    "longer": (SAME, SAME[:3], "the same bits in all 3 updates that both logged; the longer one goes on to update 5"),
    "last bit": (SAME, [*SAME[:2], update(3, loss=1.0000000000000002), *SAME[3:]], "update 3 (2 is the last that is"),
    "norm": (SAME, [update(1, grad_norm=2.0)], "update 1 (none before it is in both): grad_norm 1.0 and 2.0"),
    "zero": ([update(1, loss=0.0)], [update(1, loss=-0.0)], "update 1 (none before it is in both): loss 0.0 and -0.0"),
    "nan": ([update(1, loss=float("nan"))], [update(1, loss=float("nan"))], "the same bits in all 1 updates"),
    "gap": (
        [SAME[0], update(4, loss=9)],
        SAME,
        "update 4 at the latest (1 is the last that is the same): loss 9 and 0.8",
    ),
    "no common": (SAME[:2], SAME[3:], "no update is in both logs"),
    "time": (SAME, [update(n, rows_per_second=1.0, bytes_sent=7) for n in range(1, 6)], "the same bits in all 5"),
}


@pytest.mark.parametrize("name", PARTED)
def test_where_the_bits_of_two_runs_part(tmp_path, name):
    a, b, said = PARTED[name]
    for run, lines in (("a", a), ("b", b)):
        (tmp_path / run).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert str(difference(tmp_path / "a", tmp_path / "b")).startswith(said)


@pytest.mark.slow
def test_a_million_lines_are_read_in_bounded_memory(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for n in range(1, 1_000_001):
            print(json.dumps(update(n, loss=float(n == 777_777))), file=file)
    series = Kept(tmp_path, "long").numbers.updates["loss"]
    assert series.count == 1_000_000 and series.highest == (777_777, 1.0)
    assert len(series.points()[0]) <= 1600 and 777_777 in series.points()[0]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(page, folder):
    """The page in a headless browser: what it asked for over a network, and its picture. The browser's own requests
    have no page that began them; no host has an address here.
    """
    log, picture = folder / "net.json", folder / "page.png"
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"]
    shot = [f"--log-net-log={log}", f"--screenshot={picture}", "--window-size=1200,1600", f"--user-data-dir={folder}/u"]
    subprocess.run([CHROMIUM, *quiet, *shot, page.as_uri()], check=True, timeout=120, stderr=subprocess.DEVNULL)
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    begun = [(own["url"], own["initiator"]) for own in events if "url" in own and "initiator" in own]
    asked = [url for url, who in begun if who != "not an origin" and not url.startswith(("data:", "file:"))]
    return asked, picture.read_bytes()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_the_page_opens_in_a_browser_and_asks_nothing(tmp_path):
    one, other = two(tmp_path)
    own, asking = tmp_path / "page.html", tmp_path / "asking.html"
    assert main(["report", str(one), str(other), f"--out={own}"]) == 0
    asked, picture = opened(own, tmp_path)
    assert asked == [] and picture[:4] == b"\x89PNG" and len(picture) > 20_000
    asking.write_text('<img src="http://other.invalid/picture.png">')
    assert opened(asking, tmp_path)[0] != []  # a page that does ask is seen

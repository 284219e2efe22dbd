"""The pages of docs/: every code block runs, prints what the page says, or is a command that exists."""

from __future__ import annotations

import re
import subprocess

import commands
import pages
import pytest
from cover import EACH
from ends import line

from docs import public
from docs.pictures import draw

PAGES = pages.pages()
ELSEWHERE = {"recipes.md": "tests/test_recipes.py"}  # whose blocks run there, against plain torch
START = ("start.md", "start.zh.md")
RUN = [p for p in PAGES if p not in (*ELSEWHERE, *START) and any(b.kind == "python" for b in pages.blocks(p))]
LIMIT = 300.0  # seconds, of a page on a busy machine
EVERY = [b for p in PAGES for b in pages.blocks(p)]


@pytest.fixture(scope="module")
def lives(ends, tmp_path_factory):
    """Every page's script on two ranks, one page begun while another ends."""
    places = {page: tmp_path_factory.mktemp(page.replace("/", "-").removesuffix(".md")) for page in RUN}
    begun = iter(RUN)

    def start():
        page = next(begun, None)
        if page is not None:
            own = f"import os; os.chdir({str(places[page])!r})\n{pages.script(page)[0]}"
            ends.start(places[page] / "life", own, 2, LIMIT, short=True)

    told = {}
    start()
    for page in RUN:
        start()
        told[page] = ends.told(places[page] / "life", LIMIT)
    return told


@pytest.mark.parametrize("page", RUN)
def test_blocks_print_what_the_page_says_on_two_ranks(lives, page):
    blocks = pages.script(page)[1]
    for rank in lives[page]:
        assert rank["code"] == 0, rank["err"][-3000:]
        printed = pages.printed(rank["out"])
        assert len(printed) == len(blocks)
        for block, got in zip(blocks, printed):
            assert pages.agrees(got, block.prints or ""), f"docs/{block.name} prints\n{got}"


@EACH
def test_the_start_page_goes_as_it_is_written(ends, tmp_path, whole):
    """Its script by its own commands, as two ranks of a launcher: trained, gone on with, looked into. Without `whole`
    for fewer steps.
    """
    (block,) = [b for b in pages.blocks("start.md") if b.kind == "python"]
    script = tmp_path / "rings.py"
    script.write_text(block.code)
    typed = [c.split() for b in pages.blocks("start.md") if b.kind == "sh" for c in b.code.splitlines()]
    first, second = (words[2:] for words in typed if words[:2] == ["python", "rings.py"])
    text = next(b.code for b in pages.blocks("start.md") if b.kind == "text")
    assert "steps=300" in block.code and "--steps=400" in second
    for words, steps in ((first, 300), (second, 400)) if whole else ((first, 30), (second, 40)):
        short = [] if whole else [f"--steps={steps}", "--save_every=10"]
        own = f"import os; os.chdir({str(tmp_path)!r})\n{line(script, *words, *short)}"
        ranks = ends.run(tmp_path / str(steps), own, 2, LIMIT, short=True)
        assert all(rank["code"] == 0 for rank in ranks), ranks[0]["err"][-3000:]
        assert re.search(rf"step +{steps}  accuracy 0.{9 if whole else ''}", ranks[0]["out"]), ranks[0]["out"]
        if words is first:
            begun = ranks[0]["out"].splitlines()[: len(text.splitlines())]
            assert pages.agrees("\n".join(begun), text), begun
    from funczero.cli import main

    for words in (w for w in typed if w[:1] == ["funczero"] and w[1] in ("inspect", "verify", "export")):
        there = [str(tmp_path / w) if w.startswith(("runs/", "rings.")) else w for w in words[1:]]
        assert main(there) == 0
    assert (tmp_path / "rings.safetensors").stat().st_size > 17_092 * 4


def test_the_chinese_start_page_has_the_same_blocks():
    ours, theirs = ([(b.kind, b.code) for b in pages.blocks(page)] for page in START)
    assert ours == theirs


def test_pictures_are_what_chains_draw():
    drawn = draw.pictures()
    assert {p.name for p in draw.HERE.glob("*.svg")} == set(drawn)
    for name, svg in drawn.items():
        assert (draw.HERE / name).read_text() == svg, f"{name}: python docs/pictures/draw.py writes it anew"


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.kind == "sh" for b in pages.blocks(p))])
def test_commands_exist(page):
    for block in (b for b in pages.blocks(page) if b.kind == "sh"):
        done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
        assert done.returncode == 0, f"docs/{block.name}: {done.stderr}"
        typed = block.code.replace("\\\n", " ").splitlines()
        for found in filter(None, map(commands.wrong, typed)):
            raise AssertionError(f"docs/{block.name}: {found}")


def test_commands_in_sentences_exist():
    for page in PAGES:
        prose = pages.FENCE.sub("", (pages.DOCS / page).read_text())
        for typed in re.findall(r"`(funczero [a-z][^`{]*)`", prose):
            said = typed.replace("...", "")
            assert not commands.wrong(said), f"docs/{page}: {typed}: {commands.wrong(said)}"


def test_what_is_not_run_is_whole_and_says_why():
    yaml = pytest.importorskip("yaml")
    for block in EVERY:
        assert block.kind in ("python", "text", "sh", "yaml"), f"docs/{block.name}: nothing tries {block.kind!r}"
        if block.kind == "yaml":
            assert yaml.safe_load(block.code)["kind"] == "PyTorchJob"
        if block.kind == "python":
            compile(block.code, block.name, "exec")


def test_every_block_is_counted():
    said = pages.counted()
    print(said)
    numbers = [int(n) for n in re.findall(r"\d+", said)]
    whole, _, python, text, sh, yaml, off, _ = numbers
    assert whole == python + text + sh + yaml + off == len(EVERY)
    tried = sum(len(pages.script(p)[1]) for p in RUN) + sum(len(pages.script(p)[1]) for p in (*ELSEWHERE, *START))
    assert tried == python > 40


def test_a_name_that_no_page_has_and_one_that_says_nothing_are_told(monkeypatch):
    monkeypatch.setattr(public, "PACKAGES", ("funczero",))
    every = {name for name, _ in public.names()}
    assert list(public.undocumented(every)) == []
    assert list(public.undocumented(every - {"funczero.shard", "funczero.rng.fold"})) == [
        "funczero.shard is public, and no page of docs/reference has it",
        "funczero.rng.fold is public, and no page of docs/reference has it",
    ]
    monkeypatch.setattr("funczero.shard.__doc__", None)
    assert list(public.undocumented(every)) == ["funczero.shard is public, and has no docstring"]

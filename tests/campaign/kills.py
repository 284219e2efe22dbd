"""Kills -9 at random: one run that lives through them all, resumed after each at another stage, judged on another
world.

Run: `python tests/campaign/kills.py --lives=300 --seed=0` (some 5 s a life on two cores); `--out=kills.json` keeps
every life. A failure keeps its folder, with the stderr of its ranks, where each thread stood if one hung among it.
Expect: every resume has the bits of a run that nobody killed; no survivor lives 15 s after the kill; what a survivor
raises, or its stderr, names a dead rank.

A life goes on from the latest checkpoint, saves every other update (beside training, overwriting a name every second
time), and is killed: any rank or all of them
  by the clock  anywhere, saves under way, steps, restores
  before        after it joined the world and before it restored
  in a save     at a point of rank 0's or of its own save
  at the end    right after the last save took the state, when the script ends
Half of the lives have a store that is rank 0's own, and dies with it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import checkpoints  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from kills import nursery  # noqa: E402

from funczero.checkpoint import Checkpointer, folder  # noqa: E402
from funczero.testing import WorkerPool, tree_hash  # noqa: E402

CHAINS = "0 grad acc ar", "1 grad acc [", "2 grad [acc", "3 [grad acc"
IN_A_SAVE = "asked", "copied", "made", "chunk", "written", "merged", "sealed", "renamed"
WHEN = "by the clock", "before", "in a save", "at the end"


def chains():
    """The stages that the zoo knows, by their names there."""
    known = zoo.flat_chains(zoo.source(("data",)), 1, zoo.tx(scale=True))
    return [c for c in CHAINS if c in known]


def planned(rng):
    """A life: who dies, when, at which stage, with which store."""
    life = {
        "victims": rng.choice([[0], [1], [0, 1]]),
        "chain": rng.choice(chains()),
        "tcp": rng.random() < 0.5,
        "quick": False,
        "when": rng.choice(WHEN),
    }
    if life["when"] == "by the clock":
        life |= {"clock": rng.uniform(0.0, 1.5), "after": "trains"}
    elif life["when"] == "before":
        life |= {"clock": rng.uniform(0.0, 0.03), "after": "joined"}
    else:
        life |= {
            "point": rng.choice(IN_A_SAVE) if life["when"] == "in a save" else "ends",
            "updates": rng.randrange(1, 6),
            "goes_on": True,
        }
    return life


class Right:
    """The bits of a run that nobody killed, update by update, on one rank."""

    def __init__(self):
        self.step = checkpoints.make("3 [grad acc", 1)
        self.state, self.at = self.step.init(zoo.params(), key=7), 0
        self.hashes = {0: tree_hash(checkpoints.joined([checkpoints.parts(self.state)]))}

    def __getitem__(self, n):
        while self.at < n:
            self.state = checkpoints.train(self.step, self.state, self.at, self.at + 1)
            self.at += 1
            self.hashes[self.at] = tree_hash(checkpoints.joined([checkpoints.parts(self.state)]))
        return self.hashes[n]


def resumed(directory, chain, size):
    """What a world restores, and two updates more: (step, parts, parts)."""
    step = checkpoints.make(chain, size)
    found = Checkpointer(directory, step=step).restore(like=(step, checkpoints.abstract()))
    first = checkpoints.parts(found.state)
    return found.step, first, checkpoints.parts(checkpoints.train(step, found.state, found.step, found.step + 2))


def judged(told, victims):
    """Of the survivors of a life: (seconds after the kill, how each ended, does it name a dead rank, what it said)."""
    died = max([e["at"] for r in victims for e in told[r]["events"] if e["what"] == "dies"], default=told[0]["struck"])
    kills = [e["at"] for t in told for e in t["events"] if e["what"] == "kills"]
    died = max(kills) if kills else died
    out = []
    for r in sorted({0, 1} - set(victims)):
        raised = next((e for e in told[r]["events"] if e["what"] == "raised"), None)
        said = (raised["text"] if raised else "") + "\n" + told[r]["stderr"]
        finished = told[r]["ended"] == 0
        out.append(
            {
                "seconds": told[r]["gone"] - died,
                "kind": raised["kind"] if raised else f"exit {told[r]['ended']}",
                "finished": finished,
                "names": any(f"rank {v}" in said for v in victims),
                "said": said[-1500:],
            }
        )
    return out


def table(rows):
    """By when it died: lives, right ones, survivors, those that lasted over 15 s, those whose words name a rank,
    seconds.
    """
    print(
        f"\n{'when':14} {'lives':>6} {'right':>6} {'wrong':>6} {'lost a save':>12} {'survivors':>10} {'ended':>6}"
        f" {'finished':>9} {'over 15 s':>10} {'named':>6}   seconds: median, 90 %, most"
    )
    for when in (*WHEN, "all"):
        mine = [r for r in rows if when in (r["when"], "all")]
        left = [s for r in mine for s in r["survivors"]]
        told = [s for s in left if not s["finished"]]
        seconds = sorted(s["seconds"] for s in told)
        spread = ", ".join(f"{seconds[int(q * (len(seconds) - 1))]:.2f}" for q in (0.5, 0.9, 1.0)) if seconds else "-"
        late, named = sum(s["seconds"] > 15 for s in left), sum(s["names"] for s in told)
        print(
            f"{when:14} {len(mine):6} {sum(r['right'] for r in mine):6} {sum(not r['right'] for r in mine):6}"
            f" {sum(r['lost'] for r in mine):12} {len(left):10} {len(told):6} {len(left) - len(told):9} {late:10}"
            f" {named:6}   {spread}"
        )
    kinds: dict[str, int] = {}
    for r in rows:
        for s in r["survivors"]:
            kinds[s["kind"]] = kinds.get(s["kind"], 0) + 1
    print("survivors ended by:", ", ".join(f"{k} {n}" for k, n in sorted(kinds.items(), key=lambda x: -x[1])))


def campaign(lives, seed, place, worlds=(1, 2, 4), out=None):
    """Rows of all lives; prints as it goes."""
    torch.set_num_threads(1)
    rng, right, rows, directory = random.Random(seed), Right(), [], place / "run"
    with Checkpointer(directory, step=right.step, keep=2) as ck:
        ck.save(right.state, 0)
    pools = {n: WorkerPool(n) for n in worlds if n > 1}
    try:
        with nursery() as n:
            for i in range(lives):
                life, folder_ = planned(rng), place / f"life{i}"
                folder_.mkdir()
                os.symlink(directory, folder_ / "run")
                before = max((e.manifest.step for e in folder.listing(directory).entries), default=0)
                n.start(folder_, **life)
                told = n.told(folder_, within=120.0)
                size, chain = rng.choice(worlds), rng.choice(chains())
                found = pools[size].run(resumed, directory, chain, size) if size > 1 else [resumed(directory, chain, 1)]
                at, listing = found[0][0], folder.listing(directory)
                asked = max([e["step"] for t in told for e in t["events"] if e["what"] == "saves"], default=before)
                bits = [tree_hash(checkpoints.joined([f[k] for f in found])) for k in (1, 2)]
                row = {
                    **life,
                    "life": i,
                    "survivors": judged(told, life["victims"]),
                    "step": at,
                    "asked": asked,
                    "lost": at < asked,
                    "world": size,
                    "onto": chain,
                }
                row["right"] = bits == [right[at], right[at + 2]] and not listing.damaged and not listing.other
                row["right"] &= (
                    at in (before, asked) if "point" in life else max(before, asked - 2) <= at <= asked
                )  # every save but the last one was waited for
                row["right"] &= any(
                    told[v]["ended"] == -9 for v in life["victims"]
                )  # the second of two may have heard of the first one's end before its own
                bad = not row["right"] or any(
                    s["seconds"] > 15 or not (s["names"] or s["finished"]) for s in row["survivors"]
                )
                said = "; ".join(
                    f"{s['kind']} in {s['seconds']:.2f} s{'' if s['names'] or s['finished'] else ', no rank named'}"
                    for s in row["survivors"]
                )
                verdict = "right" if row["right"] else "WRONG"
                print(
                    f"{i:4} {life['when']:12} {life.get('point', ''):8} dies {life['victims']} found {at:4} asked"
                    f" {asked:4} as {chain!r} on {size}: {verdict}  {said}",
                    flush=True,
                )
                rows.append(row)
                if not bad:
                    (folder_ / "run").unlink()
                    shutil.rmtree(folder_)
                if out:
                    Path(out).write_text(json.dumps(rows, indent=1))
    finally:
        for pool in pools.values():
            pool.close()
    return rows


def main(_):
    """Run it, print the table."""
    logging.set_verbosity(logging.ERROR)
    place, start = Path(tempfile.mkdtemp(prefix="funczero-kills-")), time.time()
    rows = campaign(flags.FLAGS.lives, flags.FLAGS.seed, place, out=flags.FLAGS.out)
    table(rows)
    print(f"{time.time() - start:.0f} s; what was not as expected is under {place}")


if __name__ == "__main__":
    flags.DEFINE_integer("lives", 300, "how many kills")
    flags.DEFINE_integer("seed", 0, "of the choices")
    flags.DEFINE_string("out", None, "a JSON file of all lives")
    app.run(main)

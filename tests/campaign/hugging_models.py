"""Every model of tests/hugging.py at stages 0 and 3 on one and two ranks: values of plain torch, one hash of dropout.

Run:    OMP_NUM_THREADS=1 python tests/campaign/hugging_models.py [--only=llama,clip]
Expect: a line a model; far at most 1e-10 of the largest value, and one hash.
Found:  see WORKSPACE.md's log.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hugging  # noqa: E402

from funczero.testing import WorkerPool  # noqa: E402

ONLY = flags.DEFINE_list("only", None, "Names of models; by default all.")


def main(_: list[str]) -> None:
    """A table, and exit code 1 where a model differs."""
    pools, verdicts = {n: WorkerPool(n) for n in (1, 2)}, Counter[str]()
    try:
        for name in ONLY.value or hugging.MODELS:
            begun = time.monotonic()
            try:
                found = [
                    x
                    for pool in pools.values()
                    for r in pool.run(hugging.results, name, timeout=600)
                    for x in r.values()
                ]
                far, hashes = max(d for d, _ in found), {bits for _, bits in found}
                verdict = "same" if far <= 1e-10 and len(hashes) == 1 else "DIFFERS"
                said = f"far {far:.1e}, {len(hashes)} hash(es) of dropout"
            except Exception as error:
                verdict, said = "refused", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            verdicts[verdict] += 1
            print(
                f"{name:14s} {hugging.MODELS[name].kind:12s} {verdict:8s} {said} ({time.monotonic() - begun:.1f} s)",
                flush=True,
            )
    finally:
        for pool in pools.values():
            pool.close()
    print(dict(verdicts))
    sys.exit(verdicts["DIFFERS"] > 0)


if __name__ == "__main__":
    app.run(main)

"""A contender alone in processes of its own: how long it takes until its first step has ended, and by how much memory
grows over its imports. A part of `bench_step.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_report import Row

STEPS = 3  # after which memory has been at its highest
HERE = Path(__file__).parent


def lives(row: Row, o: dict[str, Any]) -> Row:
    """A row with the median of start-up and of the peak of memory of some lives."""
    found = [_life(row, o["clip"]) for _ in range(o["lives"])]
    start, over = (statistics.median(x[key] for x in found) for key in ("start", "over"))
    return row._replace(start=start, over=over)


def _life(row: Row, clip: float) -> dict[str, float]:
    """Seconds, of the slowest process, and bytes, of the largest."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {"size": row.size, "name": row.name, "bf16": row.policy == "bf16", "clip": clip, "ranks": row.ranks}
        words = [sys.executable, str(HERE / "bench_lives.py"), json.dumps(asked), folder]
        threads = {"OMP_NUM_THREADS": str(row.ranks if row.name == "plain" else 1)}
        paths = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
        started = []
        for rank in range(row.ranks):
            who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(row.ranks)}
            started.append(subprocess.Popen(words, env=os.environ | threads | paths | who))
        failed = [p.returncode for p in started if p.wait()]
        if failed:
            raise RuntimeError(f"bench_lives: {row.name} at size {row.size} on {row.ranks} ranks ended with {failed}")
        said = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(row.ranks)]
    return {key: max(x[key] for x in said) for key in ("start", "over")}


def _age() -> float:
    """Seconds since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def _memory(field: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, the most there was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main() -> None:
    """One process of a life."""
    import warnings

    import bench_contenders
    import torch.distributed as dist
    from bench_models import SIZES
    from bench_step import batches_of, fitted

    warnings.simplefilter("ignore")
    asked, folder, rank = json.loads(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
    bench_contenders.imported(asked["name"])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _memory("VmRSS")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=asked["ranks"])
    s = fitted(SIZES[asked["size"]], asked["ranks"])
    contender, batches = bench_contenders.make(asked["name"], s, asked["clip"], asked["bf16"]), batches_of(s)
    start = 0.0
    for i in range(STEPS if contender else 0):
        contender.step(contender.deal(batches[i])).item()
        start = start or _age()
    over = _memory("VmHWM") - before if contender else 0
    Path(folder, f"{rank}.json").write_text(json.dumps({"start": start, "over": over}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

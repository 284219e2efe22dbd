"""What do saving and restoring a run cost, against torch.distributed.checkpoint (DCP), sync and async?

Run:
    python experiments/bench_checkpoint.py                          # 200 MB and 600 MB of state on two processes
    python experiments/bench_checkpoint.py --megabytes=20 --rounds=3 --contenders=dcp,dcp-async,copy
    FUNCZERO_KERNELS=reference python experiments/bench_checkpoint.py   # reads and writes through tensorstore alone

How: float32 parameters and AdamW's two moments of a transformer, whose bytes are the same for all: a TrainState of a
stage-3 chain, or DTensors in Shard(0). Two gloo processes of one thread save; both restore, then a third restores alone
what two have written. A round visits everyone in a new order; `sync` comes before each part, and every restored bit is
compared. `stall`: save() returns; `total`: committed, on disk; `read 2`, `read 1`: a restore by two processes and by
one, from a warm page cache (funczero and `dcp` into tensors that are there, `dcp-async` and `funczero-new` into new
ones). All times are the slower rank's. `disk`: bytes stored. `+save`, `+read`: the most by which a rank's memory grew
in any round, the first included, so that buffers kept from then on count. `cpu`: CPU time of both ranks and all their
threads, which other jobs on a machine disturb less than the clock; `share`: bytes that the ranks read from files over
the bytes of the state. `copy` is one copy of the rank's state into memory that is there, `clone` into new memory:
what a stall is measured by. The last line says what the processes hold at most, their imports included.

Expect:
    funczero stalls for no more than one copy, and saves and restores no slower than DCP; DCP async stalls for about
    half of its sync save.

Found (--megabytes=20,200 --rounds=5 --contenders=funczero,dcp,copy; two cores that others used too, so only CPU times
and bytes can be trusted; ms, median and range; `reference`: FUNCZERO_KERNELS=reference, a run of its own in which `dcp`
saved in 278 and 414):
                   cpu save         of dcp   cpu read         share of the state read
    19 MB
    funczero       153 (151-159)    0.51     149 (147-151)    1.006
    dcp            298 (287-466)             311 (307-324)    1.438
    reference      252 (231-293)    0.91     205 (201-211)    1.006
    199 MB
    funczero       315 (310-341)    0.76     202 (200-205)    1.001
    dcp            416 (391-517)             389 (348-554)    1.041
    reference      496 (430-639)    1.20     371 (363-374)    1.001
    Saved through tensorstore, as before, the same took 225 (207-260) and 686 ms (482-695): 0.87 and 1.56 of DCP's, by
    its side. Where it goes now, both ranks together, in a profile of 154 ms at 19 MB and 313 at 199: 16 and 46 to copy;
    15 to agree, to name and to start; 10 and 29 to look for what is not finite; 52 and 142 to make checksums and to
    write, by far the most of it the system's copy into its cache; 3 to bring it to disk; 46 on rank 0 alone for orbax,
    the merge of the stores and the seal. Short of the aim: without a compiler a save of 199 MB takes 1.20 of DCP's,
    since tensorstore opens every array and copies its values once more to have their checksums.
    Quiet, by the clock, at the default sizes (--rounds=2 --contenders=funczero,dcp,copy; ms at 199 and 597 MB): a save
    500 and 1317 where DCP's sync takes 522 and 1312; the stall 40 and 81, which is 1.6 and 1.1 copies; a restore by two
    ranks 122 and 168 (DCP 283 and 366), by one 166 and 225 (313 and 517). The ranks and the reader held 1.1, 1.0, 1.2
    GB at most at 199 MB, 2.3, 2.2, 3.6 at 597. DCP's async form was not run at these sizes since.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from absl import app, flags
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

NAMES = ["funczero", "funczero-new", "dcp", "dcp-async", "copy", "clone"]
TIMES, BYTES = ["stall", "total", "read 2", "read 1", "cpu save", "cpu read"], ["disk", "+save", "+read", "share"]
SUMS = ("cpu save", "cpu read", "share")  # over the ranks, where others are the slowest's or the largest
flags.DEFINE_list("megabytes", ["200", "600"], "Sizes of the whole state, in millions of bytes.")
flags.DEFINE_list("contenders", NAMES, "Whom to run.")
flags.DEFINE_integer("rounds", 7, "Visits of everyone that count; one more comes before.")
flags.DEFINE_string("folder", "", "Where to write (empty: a new temporary folder): the disk that is measured.")

Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # what was read, and what it must equal
Costs = dict[str, dict[str, float]]  # of a round: seconds and bytes by contender and column


class Contender(NamedTuple):
    """Three acts on the checkpoint at a path, and an end."""

    save: Callable[[Path], Any] = lambda path: None
    wait: Callable[[], None] = lambda: None
    restore: Callable[[Path], Pairs] | None = None
    close: Callable[[], None] = lambda: None


def whole_tree(megabytes: int, blocks: int = 8) -> dict[str, Any]:
    """Parameters of a transformer, a twelfth of the bytes as float32 numbers: the same in every process."""
    g, d = torch.Generator().manual_seed(0), max(8, int((megabytes * 1e6 / 12 / (12 * blocks)) ** 0.5) // 8 * 8)
    shapes = {"qkv": (3 * d, d), "out": (d, d), "up": (4 * d, d), "down": (d, 4 * d), "norm": (d,)}
    return {
        "blocks": [{name: torch.randn(shape, generator=g) for name, shape in shapes.items()} for _ in range(blocks)]
    }


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-ins for AdamW's two averages, by value alone, so that they do not depend on who holds what."""
    return x * 0.1, x * x


def zero_state(tree: dict[str, Any]) -> Any:
    """The state of a stage-3 chain over all processes, with moments that are not zero."""
    import funczero as fz

    grad = fz.value_and_grad(lambda p, b: (b.sum(), b.sum()), batch=fz.P("data"), units=("blocks",))
    state = fz.train_step(
        *fz.zero(grad, fz.adamw(1e-3), stage=3, axis="data", accumulate=1), mesh={"data": -1}, check=0
    ).init(tree)
    own = state.chain["adamw"]
    for x, mu, nu in zip(state.params.buffers, own.mu.buffers, own.nu.buffers, strict=True):
        for moment, value in zip((mu, nu), moments(x), strict=True):
            moment.copy_(value)
    return state


def zero_contenders(tree: dict[str, Any], folder: Path, reader: bool) -> dict[str, Contender]:
    """funczero's checkpointers, kept over the rounds as a run keeps them; the reader's only while nobody writes.

    `funczero-new` restores into new memory, `funczero` into a state that both have.
    """
    import funczero as fz

    state = zero_state(tree)
    there = fz.tree.clone(state)

    def one(name: str, new: bool) -> Contender:
        ck = None if reader else fz.Checkpointer(folder / name, keep=None)

        def restore(path: Path) -> Pairs:
            own = ck or fz.Checkpointer(path.parent, keep=None)
            got = own.restore(like=there, name=int(path.name), donate=not new).state
            if reader:
                own.close()
            return list(zip(fz.tree.tensors(got), fz.tree.tensors(state), strict=True))

        if ck is None:
            return Contender(restore=restore)
        return Contender(lambda path: ck.save(state, int(path.name)), ck.wait, restore, ck.close)

    return {name: one(name, new=name == "funczero-new") for name in NAMES if name.startswith("funczero")}


def torch_contenders(tree: dict[str, Any]) -> dict[str, Contender]:
    """torch's checkpointer with its own defaults, and bare copies of as many bytes.

    Asynchronous saves talk in a group of their own, as torch asks.
    """
    mesh, group, pending = init_device_mesh("cpu", (dist.get_world_size(),)), dist.new_group(), []
    leaves = {f"{i}/{name}": x for i, block in enumerate(tree["blocks"]) for name, x in block.items()}
    shards = {
        f"{kind}/{name}": distribute_tensor(y, mesh, [Shard(0)], src_data_rank=None).clone()
        for name, x in leaves.items()
        for kind, y in zip(("params", "mu", "nu"), (x, *moments(x)), strict=True)
    }
    there = {name: torch.zeros_like(x) for name, x in shards.items()}
    mine, buffers = [x.to_local() for x in shards.values()], list[torch.Tensor]()

    def restore(path: Path, new: bool = False) -> Pairs:
        out = {name: torch.empty_like(x) for name, x in shards.items()} if new else there
        dcp.load(out, storage_reader=dcp.FileSystemReader(path))
        return [(out[name].to_local(), x.to_local()) for name, x in shards.items()]

    def later(path: Path) -> None:
        pending[:] = [dcp.async_save(shards, storage_writer=dcp.FileSystemWriter(path), process_group=group)]

    def copy(path: Path) -> None:
        buffers.extend([torch.zeros_like(x) for x in mine] if not buffers else [])  # in the round that does not count
        torch._foreach_copy_(buffers, mine)

    return {
        "dcp": Contender(lambda path: dcp.save(shards, storage_writer=dcp.FileSystemWriter(path)), restore=restore),
        "dcp-async": Contender(later, lambda: pending[0].result(), lambda path: restore(path, new=True)),
        "copy": Contender(copy),
        "clone": Contender(lambda path: [x.clone() for x in mine]),
    }


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, the most there was."""
    return 1024 * int(
        next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    )


class Cost(NamedTuple):
    """What some parts took on this rank."""

    ends: list[float]  # seconds from the start until each part is done
    grown: int  # bytes by which memory grew at most
    cpu: float  # seconds, of all threads
    read: int  # bytes


def spent() -> tuple[float, int]:
    """CPU seconds of this process, and the bytes that it has asked files for."""
    io = Path("/proc/self/io").read_text().splitlines()
    return time.process_time(), int(next(line for line in io if line.startswith("rchar")).split()[1])


def timed(barrier: Callable[[], Any], *parts: Callable[[], Any]) -> tuple[Cost, Any]:
    """What parts cost, and what the last returned; the disk is quiet before."""
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, ends, got = memory("VmRSS"), [], None
    barrier()
    (cpu, read), start = spent(), time.perf_counter()
    for part in parts:
        got = part()
        ends.append(time.perf_counter() - start)
    after = spent()
    return Cost(ends, memory("VmHWM") - before, after[0] - cpu, after[1] - read), got


def visit(c: Contender, path: Path, reader: bool, all_three: Barrier) -> dict[str, float]:
    """One save, a restore by two, a restore by one; what this process has to say about them."""
    cost: dict[str, float] = {"held": memory("VmHWM")}  # with what was built before
    if not reader:
        c_save, _ = timed(dist.barrier, lambda: c.save(path), c.wait)
        cost |= {"stall": c_save.ends[0], "total": c_save.ends[1], "+save": c_save.grown, "cpu save": c_save.cpu}
    all_three.wait()
    cost["disk"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for mine in (not reader, reader):
        if mine and c.restore:
            took, pairs = timed(dist.barrier, lambda: c.restore(path))
            assert all(torch.equal(a, b) for a, b in pairs), f"{path} did not read back what was written"
            more = {"read 2": took.ends[0], "+read": took.grown, "cpu read": took.cpu, "share": took.read}
            cost |= {"read 1": took.ends[0]} if reader else more
            for a, _ in pairs:
                a.zero_()  # so that the next restore cannot leave it as it is
            del pairs
        cost["held"] = max(cost["held"], memory("VmHWM"))
        all_three.wait()
    if dist.get_rank() == 0 and not reader:
        shutil.rmtree(path, ignore_errors=True)
    all_three.wait()
    return cost


def measure(o: dict, tree: dict[str, Any], folder: Path, reader: bool, all_three: Barrier) -> list[Costs]:
    """All rounds of one size: what everyone cost, as this process saw it."""
    contenders = torch_contenders(tree)
    if any(n.startswith("funczero") for n in o["contenders"]):
        contenders |= zero_contenders(tree, folder, reader)
    tree.clear()
    rounds = []
    for number in range(o["rounds"] + 1):
        names = random.Random(number).sample(o["contenders"], len(o["contenders"]))
        rounds.append({name: visit(contenders[name], folder / name / str(number), reader, all_three) for name in names})
    for name in o["contenders"]:
        contenders[name].close()
    return rounds


def worker(index: int, folder: str, o: dict, all_three: Barrier) -> None:
    """Processes 0 and 1 are a world of two; process 2 is a world of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reader = index == 2
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{int(reader)}", rank=index % 2, world_size=1 if reader else 2
    )
    for megabytes in o["megabytes"]:
        costs = measure(o, whole_tree(int(megabytes)), Path(folder, megabytes), reader, all_three)
        Path(folder, f"{megabytes}.{index}.json").write_text(json.dumps(costs))
    dist.destroy_process_group()


def figures(column: str, name: str, processes: list[list[Costs]]) -> list[float]:
    """Of every round what a contender cost: the slower or larger process's, or the sum of the ranks."""
    together = sum if column in SUMS else max
    found = [[p[name][column] for p in of_round if column in p[name]] for of_round in zip(*processes, strict=True)]
    return [together(of_round) if of_round else 0.0 for of_round in found]


def table(megabytes: str, names: list[str], processes: list[list[Costs]]) -> None:
    """A line for everyone: medians over the rounds, and in brackets the range; of memory the most of all rounds."""
    count = 12 * sum(x.numel() for block in whole_tree(int(megabytes))["blocks"] for x in block.values())
    print(f"\n{count / 1e6:.0f} MB of state, {len(processes[0]) - 1} rounds; ms and MB")
    print(f"{'':12}" + "".join(f"{c:>19}" for c in TIMES) + "".join(f"{c:>7}" for c in BYTES))
    for name in names:
        line = f"{name:12}"
        for column in TIMES + BYTES:
            costs = figures(column, name, processes)
            ms = [1e3 * x for x in costs[1:]]
            if column in TIMES:
                line += f"{statistics.median(ms):8.0f} ({min(ms):4.0f}-{max(ms):4.0f})"
            else:
                line += f"{max(costs) / count:7.3f}" if column == "share" else f"{max(costs) / 1e6:7.0f}"
        print(line, flush=True)
    held = [max(c["held"] for of_round in p for c in of_round.values()) for p in processes]
    print(f"held at most, by the two ranks and the reader: {', '.join(f'{x / 1e6:.0f}' for x in held)} MB", flush=True)


def main(_: list[str]) -> None:
    o, all_three = flags.FLAGS.flag_values_dict(), torch.multiprocessing.get_context("spawn").Barrier(3)
    with tempfile.TemporaryDirectory(dir=o["folder"] or None) as folder:
        torch.multiprocessing.spawn(worker, (folder, o, all_three), nprocs=3)
        for megabytes in o["megabytes"]:
            table(
                megabytes,
                o["contenders"],
                [json.loads(Path(folder, f"{megabytes}.{index}.json").read_text()) for index in range(3)],
            )


if __name__ == "__main__":
    app.run(main)

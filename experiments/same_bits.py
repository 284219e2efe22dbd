"""Do the weights of a GPT come out bit for bit the same on any number of ranks, at any ZeRO stage and nesting?

Run:
    python experiments/same_bits.py                      # worlds 1, 2, 4, 8; some minutes on two cores
    python experiments/same_bits.py --worlds=1,2 --updates=5
    python experiments/same_bits.py --sums=exact         # worlds 1 to 8, uneven deals, resumes, engines

How: the same global batches of 8 micro-batches, with dropout, clip, AdamW, dynamic loss scaling and one update that
overflows and is skipped, on 1 to 8 gloo processes; each chain once in float32 (bfloat16 hides a wrong tree: its
gradients add almost exactly) and once with bfloat16 compute. sha256 of the weights, and of the losses, weights, norms
and decisions of all updates. With exact sums also worlds that are no power of two, in which some ranks have no
micro-batch at the end, an update with one micro-batch 2**20 times the others (a forced split), a run that goes on from
three ranks on five and on two, and an engine (of a model without dropout, so with a hash of its own).

Expect:
    one hash of weights and one of logs in float32, one of each in bfloat16; in place and pure, keep and remat,
    streamed, every nesting.

Found (2 cores, torch 2.13, one thread a process):
    20 updates, worlds 1, 2, 4, 8, 57 chains: in float32 one hash of weights (2f2f2f2e059d) and one of logs, in bfloat16
    compute one of each (00ea69305053); one update skipped in every run; four minutes. Bytes differ by up to nine times,
    bits by none. The hash is of a kind of machine: on another one the same commit, those before the folders became
    floors, and those after all have 1854291189d3 and 2bf7a9025548; on a third one the first commit with this script and
    the one with differentiable steps, on worlds 1, 2, 4, 8, have deddc9742af4 and 662f70e3851d.
    --sums=exact --updates=6, worlds 1 to 8 (in two runs, 1,2,3,5,6 and 4,7,8): one hash in float32 (76ed31dd7b01) and
    one with bfloat16 compute (dab6544d38bd), resumes from three ranks on five and two included; engines at stages 0 to
    3 on 1, 2, 3, 4 and 6 ranks: one hash each. The second run took 25 minutes beside seven other jobs.
"""

import sys
import tempfile
from functools import partial

import gpt
import torch
from absl import app, flags

import funczero as fz
from funczero import P
from funczero.core.order import Dealt
from funczero.core.rows import split
from funczero.testing import WorkerPool, tree_hash

flags.DEFINE_list("worlds", None, "Numbers of processes up to 8; by default 1, 2, 4, 8, and with exact sums 1 to 8.")
flags.DEFINE_enum("sums", "tree", ["tree", "exact"], "How gradients are added, as train_step's.")
flags.DEFINE_integer("updates", 20, "Updates a run.", lower_bound=2)
flags.DEFINE_list("policies", ["float32", "compute=bfloat16"], "Policies to run; a comma inside one is written as '+'.")

MICROS, ROWS, LENGTH, SIZES, OVERFLOW, SPLIT = 8, 2, 24, gpt.Sizes(2, 32, 2), 1, 3
NESTS = {4: [(2, 2)], 6: [(2, 3), (3, 2)], 8: [(2, 4), (4, 2)]}


def block(p: dict, x: torch.Tensor, angles: torch.Tensor, key: int) -> torch.Tensor:
    """The GPT's block with dropout on what it adds."""
    return x + fz.rng.dropout(gpt.block(p, x, angles) - x, 0.1, key)


def loss_fn(params: dict, batch: dict, key: int, remat: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of nll over masked bytes, how many)."""
    x = torch.nn.functional.embedding(batch["x"], params["embed"])
    angles = gpt.rotary(LENGTH, SIZES.width // SIZES.heads, x.device)
    x = fz.layers(block, params["blocks"], x, angles, key=key, remat=remat)
    scores = torch.nn.functional.layer_norm(x, x.shape[-1:], params["norm"]) @ params["head"].T
    nll = torch.nn.functional.cross_entropy(scores.float().flatten(0, 1), batch["y"].flatten(), reduction="none")
    return (nll * batch["mask"].flatten()).sum(), batch["mask"].sum()


def batch(t: int, split: bool = False) -> dict:
    """Update t's global batch: ragged masks, one empty micro-batch, and at update OVERFLOW one infinite weight.

    With split, one micro-batch of update SPLIT weighs 2**20 times as much as the others.
    """
    g = torch.Generator().manual_seed(t)
    n = MICROS * ROWS
    tokens = torch.randint(256, (n, LENGTH + 1), generator=g)
    mask = (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (n, 1), generator=g)).float()
    mask[2 * ROWS : 3 * ROWS] = 0
    if t == OVERFLOW:
        mask[5 * ROWS, 0] = torch.inf
    if split and t == SPLIT:
        mask[6 * ROWS : 7 * ROWS] *= 2.0**20
    return {"x": tokens[:, :-1], "y": tokens[:, 1:], "mask": mask}


def chains(world: int) -> dict:
    """name -> (mesh, chain, micro-batches that one streamed call takes or 0, donate)."""
    k, acc, sh, ar = -(-MICROS // world), fz.accumulate, fz.shard, fz.all_reduce
    tx = (fz.scale_loss(init=2.0**10, weight=256, window=6, hysteresis=1), fz.clip_by_global_norm(0.8), fz.adamw(3e-3))

    def grad(*axes: str, remat: bool = False):
        return fz.value_and_grad(partial(loss_fn, remat=remat), batch=P(axes), units=("blocks",), rng=True)

    g, d = grad("data"), {"data": world}
    out = {f"stage {s}": (d, fz.zero(g, *tx, stage=s, accumulate=k), 0, False) for s in range(4)}
    out |= {
        "stage 3, in place": (d, fz.zero(g, *tx, stage=3, accumulate=k), 0, True),
        "stage 3, remat": (d, fz.zero(grad("data", remat=True), *tx, stage=3, accumulate=k), 0, False),
        "stage 3, streamed": (d, (sh("data", g, acc(k, stream=True), *tx),), k, False),
        "stage 3, without units": (d, fz.zero(g._replace(units=()), *tx, stage=3, accumulate=k), 0, False),
    }
    if k > 1:
        out["0: all_reduce | acc"] = (d, (g, ar("data"), acc(k), *tx), 0, False)
    if k > 1 and k % 2 == 0:
        out |= {
            "1: acc | acc | [": (d, (g, acc(2), acc(k // 2), sh("data", *tx)), 0, False),
            "2: acc | [ acc": (d, (g, acc(2), sh("data", acc(k // 2), *tx)), 0, False),
            "2: acc | [ streamed": (d, (g, acc(2), sh("data", acc(k // 2, stream=True), *tx)), k // 2, False),
            "3: [ acc | acc": (d, (sh("data", g, acc(2), acc(k // 2), *tx),), 0, False),
        }
    for node, local in NESTS.get(world, ()):
        n, m = grad("node", "local"), {"node": node, "local": local}
        last = () if k == 1 else (acc(k),)
        out |= {
            f"{node}x{local} DDP": (m, (n, *last, ar("local"), ar("node"), *tx), 0, False),
            f"{node}x{local} MiCS": (m, fz.mics(n, *tx, accumulate=k), 0, False),
            f"{node}x{local} hpZ": (m, fz.hpz(n, *tx, accumulate=k), 0, False),
            f"{node}x{local} hpZ, scattered at once": (m, (sh("local", n, sh("node", *last, *tx)),), 0, False),
            f"{node}x{local} ZeRO-3": (m, fz.zero(n, *tx, stage=3, axis=("local", "node"), accumulate=k), 0, False),
        }
    return out


def made(world: int, name: str, policy: str, sums: str):
    """(step, micro-batches that one streamed call takes or 0) of one chain."""
    mesh, parts, stream, donated = chains(world)[name]
    step = fz.train_step(*parts, mesh=mesh, policy=policy, sums=sums)
    return fz.donate(step) if donated else step, stream


def updated(step, state, t: int, stream: int, exact: bool):
    """The state after update t, and its metrics."""
    mine = step.local_rows(batch(t, exact), ROWS)
    parts = mine.split if isinstance(mine, Dealt) else partial(split, mine, what="stream")
    for b in [*parts(n=stream), None] if stream else [mine]:
        state, m = step(state, b)
    return state, m


def run(world: int, name: str, policy: str, sums: str, updates: int) -> tuple[str, str, float, int]:
    """(hash of weights, hash of logs, bytes sent per update, skipped updates) of one chain."""
    step, stream = made(world, name, policy, sums)
    state, logs = step.init(gpt.init(0, SIZES), key=1), []
    with fz.count_bytes(step) as sent:
        for t in range(updates):
            state, m = updated(step, state, t, stream, sums == "exact")
            logs.append((m.weight, m.ok, m.scale, m.updates, *((m.loss, m.grad_norm) if m.ok else ())))
    return (
        tree_hash(step.params(state))[:12],
        tree_hash(logs)[:12],
        sum(sent.values()) / updates,
        sum(not m[1] for m in logs),
    )


def stretch(folder: str, world: int, name: str, policy: str, updates: list[int], first: bool) -> str:
    """Some updates of a run, from the last checkpoint of the folder on, or from the start; saved. A hash of weights."""
    step, stream = made(world, name, policy, "exact")
    with fz.Checkpointer(folder, step=step) as saver:
        like = (step, gpt.init(0, SIZES))
        state = step.init(gpt.init(0, SIZES), key=1) if first else saver.restore(like=like).state
        for t in updates:
            state, _ = updated(step, state, t, stream, True)
        saver.save(state, int(state.step))
        saver.wait()
    return tree_hash(step.params(state))[:12]


def engine(stage: int, policy: str, updates: int, micros: int = 12) -> str:
    """A hash of the weights of an engine, whose config asks for exact sums."""
    import funczero.deepspeed as deepspeed

    world, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micros // world,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": "bfloat16" in policy},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "funczero": {"sums": "exact"},
    }
    trained, *_ = deepspeed.initialize(model=module, config=config)
    dtype = torch.bfloat16 if "bfloat16" in policy else torch.float32
    for t in range(updates):
        g = torch.Generator().manual_seed(t)
        x, y = torch.randn(micros, 2, 16, generator=g).to(dtype), torch.randn(micros, 2, 8, generator=g)
        for i in range(rank, micros, world):
            trained.backward((trained(x[i]).float() - y[i]).square().mean())
            trained.step()
    return tree_hash({n: p.clone() for n, p in trained.module.state_dict().items()})[:12]


def elsewhere(policies: list[str], updates: int) -> tuple[dict, dict]:
    """By policy the hashes of runs that went on in other worlds, and of engines."""
    resumed: dict = {p: set() for p in policies}
    engines: dict = {p: set() for p in policies}
    half = updates // 2
    pools = {n: WorkerPool(n) for n in (1, 2, 3, 4, 5, 6)}
    for p in policies:
        for world, name in ((5, "stage 3"), (2, "stage 1"), (5, "stage 2"), (2, "stage 3, streamed")):
            with tempfile.TemporaryDirectory() as folder:
                three = "stage 1" if world == 2 else "stage 3, streamed"
                pools[3].run(stretch, folder, 3, three, p, list(range(half)), True, timeout=300)
                rest = list(range(half, updates))
                found = pools[world].run(stretch, folder, world, name, p, rest, False, timeout=300)
            resumed[p].update(found)
            print(f"  3->{world}  {p}: {three}, then {name}: {found[0]}", flush=True)
        for world in (1, 2, 3, 4, 6):
            for stage in range(4):
                engines[p].update(pools[world].run(engine, stage, p, updates, timeout=300))
        print(f"  engine  {p}: stages 0 to 3 on 1, 2, 3, 4 and 6 ranks: {sorted(engines[p])}", flush=True)
    for pool in pools.values():
        pool.close()
    return resumed, engines


def main(_: list) -> int:
    """Prints the table; exit code 1 if there is more than one hash a policy."""
    o, found = flags.FLAGS, {}
    policies = [p.replace("+", ",") for p in o.policies]
    worlds = o.worlds or (range(1, 9) if o.sums == "exact" else (1, 2, 4, 8))
    print(
        f"{'world':>5}  {'chain':32}"
        + "".join(f"{p + ': weights':>24} {'logs':>13}" for p in policies)
        + f"{'kB/update':>11}  skipped"
    )
    for world in map(int, worlds):
        with WorkerPool(world) as pool:
            for name in chains(world):
                rows = [pool.run(run, world, name, p, o.sums, o.updates, timeout=300) for p in policies]
                for p, ranks in zip(policies, rows):
                    found.setdefault(p, set()).update(r[:2] for r in ranks)
                cells = "".join(f"{r[0][0]:>24} {r[0][1]:>13}" for r in rows)
                print(f"{world:5d}  {name:32}{cells}{rows[0][0][2] / 1e3:11.1f}  {rows[0][0][3]}", flush=True)
    bad = False
    resumed, engines = elsewhere(policies, o.updates) if o.sums == "exact" else ({}, {})
    for p, hashes in found.items():
        weights = {w for w, _ in hashes} | resumed.get(p, set())
        one = len(hashes) == len(weights) == 1 and len(engines.get(p, {0})) == 1
        bad = bad or not one
        print(f"{p}: {'one hash' if one else f'{len(hashes)} HASHES; elsewhere {weights}, {engines.get(p)}'}")
    return int(bad)


if __name__ == "__main__":
    torch.set_num_threads(1)
    app.run(lambda argv: sys.exit(main(argv)))

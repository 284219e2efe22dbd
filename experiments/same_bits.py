"""Do the weights of a GPT come out bit for bit the same on any number of ranks, at any ZeRO stage and nesting?

Run:
    python experiments/same_bits.py                      # worlds 1, 2, 4, 8; some minutes on two cores
    python experiments/same_bits.py --worlds=1,2 --updates=5

How: the same global batches of 8 micro-batches, with dropout, clip, AdamW, dynamic loss scaling and one update that
overflows and is skipped, on 1 to 8 gloo processes; each chain once in float32 (bfloat16 hides a wrong tree: its
gradients add almost exactly) and once with bfloat16 compute. sha256 of the weights, and of the losses, weights, norms
and decisions of all updates.

Expect:
    one hash of weights and one of logs in float32, one of each in bfloat16; in place and pure, keep and remat,
    streamed, every nesting.

Found (2 cores, torch 2.13, one thread a process):
    20 updates, worlds 1, 2, 4, 8, 57 chains: in float32 one hash of weights (2f2f2f2e059d) and one of logs, in bfloat16
    compute one of each (00ea69305053); one update skipped in every run; four minutes. Bytes differ by up to nine times,
    bits by none. The hash is of a kind of machine: on another one the same commit, those before the folders became
    floors, and those after all have 1854291189d3 and 2bf7a9025548; on a third one the first commit with this script and
    the one with differentiable steps, on worlds 1, 2, 4, 8, have deddc9742af4 and 662f70e3851d.
"""

import sys
from functools import partial

import gpt
import torch
from absl import app, flags

import funczero as fz
from funczero import P
from funczero.core.rows import split
from funczero.testing import WorkerPool, tree_hash

flags.DEFINE_list("worlds", ["1", "2", "4", "8"], "Numbers of processes; powers of two up to 8.")
flags.DEFINE_integer("updates", 20, "Updates a run.", lower_bound=2)
flags.DEFINE_list("policies", ["float32", "compute=bfloat16"], "Policies to run; a comma inside one is written as '+'.")

MICROS, ROWS, LENGTH, SIZES, OVERFLOW = 8, 2, 24, gpt.Sizes(2, 32, 2), 1


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


def batch(t: int) -> dict:
    """Update t's global batch: ragged masks, one empty micro-batch, and at update OVERFLOW one infinite weight."""
    g = torch.Generator().manual_seed(t)
    n = MICROS * ROWS
    tokens = torch.randint(256, (n, LENGTH + 1), generator=g)
    mask = (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (n, 1), generator=g)).float()
    mask[2 * ROWS : 3 * ROWS] = 0
    if t == OVERFLOW:
        mask[5 * ROWS, 0] = torch.inf
    return {"x": tokens[:, :-1], "y": tokens[:, 1:], "mask": mask}


def chains(world: int) -> dict:
    """name -> (mesh, chain, micro-batches that one streamed call takes or 0, donate)."""
    k, acc, sh, ar = MICROS // world, fz.accumulate, fz.shard, fz.all_reduce
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
        out |= {
            "0: all_reduce | acc": (d, (g, ar("data"), acc(k), *tx), 0, False),
            "1: acc | acc | [": (d, (g, acc(2), acc(k // 2), sh("data", *tx)), 0, False),
            "2: acc | [ acc": (d, (g, acc(2), sh("data", acc(k // 2), *tx)), 0, False),
            "2: acc | [ streamed": (d, (g, acc(2), sh("data", acc(k // 2, stream=True), *tx)), k // 2, False),
            "3: [ acc | acc": (d, (sh("data", g, acc(2), acc(k // 2), *tx),), 0, False),
        }
    for node, local in [(2, 2)] * (world == 4) + [(2, 4), (4, 2)] * (world == 8):
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


def run(world: int, name: str, policy: str, updates: int) -> tuple[str, str, float, int]:
    """(hash of weights, hash of logs, bytes sent per update, skipped updates) of one chain."""
    mesh, parts, stream, donated = chains(world)[name]
    step = fz.train_step(*parts, mesh=mesh, policy=policy)
    step = fz.donate(step) if donated else step
    state, logs = step.init(gpt.init(0, SIZES), key=1), []
    with fz.count_bytes(step) as sent:
        for t in range(updates):
            rows = step.local_rows(batch(t))
            calls = [*split(rows, stream, "stream"), None] if stream else [rows]
            for b in calls:
                state, m = step(state, b)
            logs.append((m.weight, m.ok, m.scale, m.updates, *((m.loss, m.grad_norm) if m.ok else ())))
    return (
        tree_hash(step.params(state))[:12],
        tree_hash(logs)[:12],
        sum(sent.values()) / updates,
        sum(not m[1] for m in logs),
    )


def main(_: list) -> int:
    """Prints the table; exit code 1 if there is more than one hash a policy."""
    o, found = flags.FLAGS, {}
    policies = [p.replace("+", ",") for p in o.policies]
    print(
        f"{'world':>5}  {'chain':32}"
        + "".join(f"{p + ': weights':>24} {'logs':>13}" for p in policies)
        + f"{'kB/update':>11}  skipped"
    )
    for world in map(int, o.worlds):
        with WorkerPool(world) as pool:
            for name in chains(world):
                rows = [pool.run(run, world, name, p, o.updates, timeout=300) for p in policies]
                for p, ranks in zip(policies, rows):
                    found.setdefault(p, set()).update(r[:2] for r in ranks)
                cells = "".join(f"{r[0][0]:>24} {r[0][1]:>13}" for r in rows)
                print(f"{world:5d}  {name:32}{cells}{rows[0][0][2] / 1e3:11.1f}  {rows[0][0][3]}", flush=True)
    for p, hashes in found.items():
        print(f"{p}: {'one hash' if len(hashes) == 1 else f'{len(hashes)} HASHES'}")
    return int(any(len(hashes) > 1 for hashes in found.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    app.run(lambda argv: sys.exit(main(argv)))

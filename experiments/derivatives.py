"""What do torch.func and create_graph give over data-parallel parameters: the global derivative, another one, an error?

Run:
    python experiments/derivatives.py                                   # four minutes on two cores
    python experiments/derivatives.py --contenders=ddp,stage3 --calls=hvp

How: an MLP with two blocks in float64, eight rows on two gloo processes. Every pair of a contender and a call is a
program of its own, written as its users would write it, and compared with unsharded torch on one process: the largest
difference relative to the largest value. DeepSpeed takes part where it can be imported (with float32 parameters, which
its engine wants).

Expect:
    funczero: below 1e-10 everywhere. The peers: right in what they are made for, a gradient of a plain loss; elsewhere
    an error, or the derivative of this rank's rows alone, without a word.

Found (torch 2.13.0, DeepSpeed 0.19.8; differences from unsharded torch):
                DDP      FSDP2            DeepSpeed-1      DeepSpeed-3            funczero 0, 1, 2, 3
    gradient    1e-16    1e-16            2e-07 (float32)  2e-07 (float32)        1e-16
    func.grad   2.1      AttributeError   2.1              AttributeError         1e-16
    hvp         0.56     RuntimeError     0.56             RuntimeError           1e-16
    hvp, twice  0.56     RuntimeError     0.56             RuntimeError           1e-16
    per sample  0.76     AttributeError   0.76             RuntimeError           3e-16
    penalty     1e-16    RuntimeError     IndexError       1e-07 (float32)        1e-16
    jvp         3e-16    3e-16            2e-07 (float32)  NotImplementedError    3e-16
    meta        3.4      AttributeError   3.4              AttributeError         2e-14
    What DDP and DeepSpeed-1 answer in rows 2 to 5 and in the last is this rank's own derivative, without a word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from absl import app, flags
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

CALLS = {
    "gradient": "loss.backward(), or grad of the loss",
    "func.grad": "torch.func.grad by the parameters",
    "hvp": "a Hessian-vector product, forward over reverse",
    "hvp, twice": "the same by create_graph, reverse over reverse",
    "per sample": "clipped gradients of rows, added",
    "penalty": "a penalty on the gradient by inputs, in the loss",
    "jvp": "a jvp by inputs, in the loss",
    "meta": "the derivative by the learning rate through three AdamW updates",
}
CONTENDERS = ["ddp", "fsdp2", "deepspeed1", "deepspeed3", "stage0", "stage1", "stage2", "stage3"]
flags.DEFINE_list("contenders", CONTENDERS, "Whom to ask.")
flags.DEFINE_list("calls", list(CALLS), "What to ask.")
flags.DEFINE_float("limit", 60.0, "Seconds after which a program hangs.")
flags.DEFINE_string("one", "", "Internal: contender:call, under torchrun.")
Named = dict[str, Tensor]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, 6]."""
        return x + torch.tanh(self.fc(x))


class Net(nn.Module):
    """An MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.blocks, self.out = nn.Linear(4, 6), nn.Sequential(Block(), Block()), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, 4]."""
        return self.out(self.blocks(torch.tanh(self.inp(x))))


def rows(n: int = 8) -> Named:
    """The global batch, and directions."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return {"x": draw(n, 4), "y": draw(n, 2), "v": draw(n, 4)}


def summed(model: Any, b: Named) -> Tensor:
    """The sum of losses of rows."""
    return ((model(b["x"]) - b["y"]) ** 2).sum()


def penalty(model: Any, b: Named) -> Tensor:
    """With a gradient penalty."""
    x = b["x"].clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return ((g.norm(dim=1) - 1) ** 2).sum() + summed(model, b)


def along(model: Any, b: Named) -> Tensor:
    """With a jvp inside."""
    out, d = jvp(lambda x: model(x), (b["x"],), (b["v"],))
    return ((out - b["y"] + d) ** 2).sum()


LOSSES: dict[str, Callable[[Any, Named], Tensor]] = {"penalty": penalty, "jvp": along}


def clipped(g: Named) -> Named:
    """One row's gradient, of a norm of at most 1."""
    norm = torch.stack([(x**2).sum() for x in g.values()]).sum().sqrt()
    return {k: x / norm.clamp(min=1.0) for k, x in g.items()}


def adamw(p: Named, g: Named, own: tuple[int, Named, Named], lr: Tensor) -> tuple[Named, tuple[int, Named, Named]]:
    """One update of plain operations."""
    n, mu, nu = own
    n += 1
    mu = {k: 0.9 * mu[k] + 0.1 * g[k] for k in p}
    nu = {k: 0.999 * nu[k] + 0.001 * g[k] ** 2 for k in p}
    step = {k: mu[k] / (1 - 0.9**n) / ((nu[k] / (1 - 0.999**n)).sqrt() + 1e-8) for k in p}
    return {k: p[k] * (1 - 0.01 * lr) - lr * step[k] for k in p}, (n, mu, nu)


def answer(model: nn.Module, call: str, b: Named, direction: Named) -> Named:
    """A call on a module, as torch's documentation has it: the truth, where it is no wrapper."""
    p = {n: x for n, x in model.named_parameters()}
    mean = lambda q, b: summed(lambda x: functional_call(model, q, (x,)), b) / len(b["x"])
    still = {n: x.detach() for n, x in p.items()}
    if call == "func.grad":
        return grad(mean)(still, b)
    if call == "hvp":
        return jvp(lambda q: grad(mean)(q, b), (still,), (direction,))[1]
    if call == "hvp, twice":
        first = torch.autograd.grad(summed(model, b) / len(b["x"]), list(p.values()), create_graph=True)
        inner = sum((g * direction[n]).sum() for n, g in zip(p, first, strict=True))
        return dict(zip(p, torch.autograd.grad(inner, list(p.values())), strict=True))
    if call == "per sample":
        each = lambda r: clipped(grad(lambda q: mean(q, {k: x[None] for k, x in r.items()}))(still))
        return {n: x.sum(0) for n, x in vmap(each)(b).items()}
    if call == "meta":
        return {"lr": grad(lambda lr: trained(mean, still, b, lr))(torch.tensor(0.05, dtype=torch.float64))}
    loss = LOSSES.get(call, summed)(model, b) / len(b["x"])
    loss.backward()
    return {n: x.grad for n, x in p.items() if x.grad is not None}


def trained(mean: Callable[..., Tensor], p: Named, b: Named, lr: Tensor) -> Tensor:
    """The loss after three updates."""
    zeros = {k: torch.zeros_like(x) for k, x in p.items()}
    own = (0, zeros, zeros)
    for _ in range(3):
        p, own = adamw(p, grad(mean)(p, b), own, lr)
    return mean(p, b)


def of_peer(name: str, call: str, b: Named, direction: Named) -> Named:
    """A peer's answer on this rank's rows, whole."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    net = Net().double()
    if name.startswith("deepspeed"):
        import deepspeed

        net = net.float()
        b, direction = ({k: x.float() for k, x in t.items()} for t in (b, direction))
        config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": int(name[-1])}}
        config |= {"zero_allow_untested_optimizer": True}  # its own would be compiled first
        sgd = torch.optim.SGD(net.parameters(), 1.0)
        engine = deepspeed.initialize(model=net, optimizer=sgd, config=config)[0]
        if call in ("gradient", *LOSSES):
            engine.backward(LOSSES.get(call, summed)(engine, b) / len(b["x"]))
            full = deepspeed.utils.safe_get_full_grad
            return {n: full(p) for n, p in net.named_parameters()}
        return answer(engine.module, call, b, direction)
    dist.init_process_group("gloo")
    if name == "ddp":
        found = answer(DistributedDataParallel(net), call, b, {f"module.{n}": x for n, x in direction.items()})
        return {n.removeprefix("module."): x for n, x in found.items()}
    for block in net.blocks:
        fully_shard(block)
    found = answer(fully_shard(net), call, b, direction)
    return {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in found.items()}


def of_funczero(name: str, call: str, b: Named, direction: Named) -> Named:
    """Ours: parts, joined for the comparison."""
    import funczero as fz

    loss = lambda model, b: (LOSSES.get(call, summed)(model, b), b["x"].new_tensor(float(len(b["x"]))))
    fn, p = fz.stateless(Net().double(), loss)
    source = fz.value_and_grad(fn, batch=fz.P("data"), higher_order=call in LOSSES)
    step = fz.train_step(*fz.zero(source, fz.adamw(0.05), stage=int(name[-1])), mesh={"data": 2}, policy="float64")
    state = step.init(p)
    sharded, mine = fz.sharded_loss(step, fn, state), fz.parts(state)
    cut = fz.parts(step.init(direction))
    whole = lambda parts: step.params(fz.with_parts(state, parts))
    if call == "meta":
        smooth, own = fz.differentiable(step), state.chain["adamw"]

        def after(lr: Tensor) -> Tensor:
            at = step.with_state(state, own._replace(rates={**own.rates, "lr": lr}))
            return sharded(fz.parts(fz.unroll(smooth, at, [b] * 3)[0]), b)

        return {"lr": grad(after)(torch.tensor(0.05, dtype=torch.float64))}
    if call == "hvp":
        return whole(jvp(lambda q: grad(sharded)(q, b), (mine,), (cut,))[1])
    if call == "hvp, twice":
        return whole(grad(lambda q: sharded.dot(grad(sharded)(q, b), cut))(mine))
    if call == "per sample":
        return whole(fz.per_sample(sharded, clipped)(mine, b))
    if call == "func.grad":
        return whole(grad(sharded)(mine, b))
    plain = fz.train_step(*fz.zero(source, fz.sgd(1.0), stage=int(name[-1])), mesh={"data": 2}, policy="float64")
    new, _ = plain(plain.init(p), b)  # p - gradient
    return {n: p[n] - x for n, x in plain.params(new).items()}


def one(contender: str, call: str) -> None:
    """Rank 0 prints the difference, or what was raised."""
    torch.set_num_threads(1)
    rank, b, net = int(os.environ["RANK"]), rows(), Net().double()
    g = torch.Generator().manual_seed(2)
    direction = {n: torch.randn(x.shape, generator=g, dtype=torch.float64) for n, x in net.named_parameters()}
    want = answer(net, call, b, direction)
    mine = {k: x[rank * 4 : rank * 4 + 4] for k, x in b.items()}
    ask = of_funczero if contender.startswith("stage") else of_peer
    try:
        got = ask(contender, call, mine, direction)
        if not got or any(n not in got or got[n] is None or got[n].shape != x.shape for n, x in want.items()):
            said = "nothing, or another shape"
        else:
            top = max(x.abs().max().item() for x in want.values())
            said = f"{max((got[n].double() - x).abs().max().item() for n, x in want.items()) / top:.1e}"
    except Exception as error:  # whatever a peer says is the answer
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
    if rank == 0:
        print("ANSWER " + json.dumps(said), flush=True)
    os._exit(0)


def asked(contender: str, call: str, limit: float) -> str:
    """The answer of a pair of processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, f"--one={contender}:{call}"], capture_output=True, text=True, timeout=limit, env=env
        )
    except subprocess.TimeoutExpired:
        return f"hangs ({limit:.0f} s)"
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return str(json.loads(lines[0][7:])) if lines else f"no answer ({done.stderr.strip().splitlines()[-1][:60]})"


def main(_: list[str]) -> None:
    """A table."""
    if flags.FLAGS.one:
        return one(*flags.FLAGS.one.split(":"))
    for call in flags.FLAGS.calls:
        print(f"{call}: {CALLS[call]}", flush=True)
        for contender in flags.FLAGS.contenders:
            print(f"    {contender:11} {asked(contender, call, flags.FLAGS.limit)}", flush=True)


if __name__ == "__main__":
    app.run(main)

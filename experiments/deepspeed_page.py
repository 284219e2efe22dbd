"""Does the program of DeepSpeed's first page run as it is written, and does a run that was killed go on with the same
losses?

Run:
    # fp16 as on the page and bf16 at ZeRO-2, each three times on two processes: whole, killed, resumed
    python experiments/deepspeed_page.py
    # the program by itself
    torchrun --nproc-per-node=2 experiments/deepspeed_page.py --deepspeed_config ds_config.json --save_dir runs/page
Expect:
    The losses after the resume are those of the run that nobody killed, bit for bit, and they fall.
    `funczero.deepspeed` instead of `deepspeed` is the only change.
Found:
    fp16, ZeRO-1, as on the page: 48 micro-batches, 46 updates applied, loss 5.7559 -> 5.1858; killed at 27, resumed at
    21: same losses, bit for bit
    bf16, ZeRO-2, two micro-batches an update: 24 updates, loss 5.7551 -> 3.1919; killed at 27, resumed at 21, in
    mid-window: same losses, bit for bit
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz
import funczero.deepspeed as deepspeed

PAGE = {
    "train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
    "fp16": {"enabled": True}, "zero_optimization": True,
}  # fmt: skip
BF16 = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
}
LENGTH, STEPS, INTERVAL, KILLED = 32, 48, 10, 27


class Net(nn.Module):
    """A byte-level transformer whose forward returns the mean loss of a batch of windows."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, 0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.embed(batch["x"]) + self.place(torch.arange(LENGTH))
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), batch["y"].flatten())


def windows(rows: int, first: int):
    """This rank's micro-batches of Python's own library, from micro-batch `first` on; what dropout draws follows from
    the position, too.
    """
    corpus, _ = fz.data.load()
    world, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
    for step in range(first, STEPS):
        torch.manual_seed(1000 * step + rank)
        batch = fz.data.batch(corpus, 0, step, rows * world, LENGTH)
        yield {key: x[rank * rows : (rank + 1) * rows] for key, x in batch.items()}


def train(args: argparse.Namespace) -> None:
    """The page's program."""
    torch.manual_seed(0)
    net = Net()
    params = [p for p in net.parameters() if p.requires_grad]
    deepspeed.init_distributed()
    model_engine, optimizer, _, _ = deepspeed.initialize(args=args, model=net, model_parameters=params)
    _, client_sd = model_engine.load_checkpoint(args.load_dir, args.ckpt_id)
    first = client_sd.get("step", -1) + 1
    data_loader = windows(model_engine.train_micro_batch_size_per_gpu(), first)
    for step, batch in enumerate(data_loader, first):
        loss = model_engine(batch)
        model_engine.backward(loss)
        model_engine.step()
        if step % args.save_interval == 0:
            client_sd["step"] = step
            model_engine.save_checkpoint(args.save_dir, loss.item(), client_sd=client_sd)
        if deepspeed.comm.get_rank() == 0:
            with Path(args.save_dir, args.losses).open("a") as f:
                f.write(json.dumps([step, loss.item(), model_engine.was_step_applied()]) + "\n")
        if step == args.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, log: str, *flags: str) -> list:
    """One run on two processes: its lines."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        f"--deepspeed_config={folder}/ds_config.json",
    ]
    done = subprocess.run(
        [*command, f"--save_dir={folder}", f"--losses={log}", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if (done.returncode != 0) != any("kill" in f for f in flags):
        sys.exit(done.stderr)
    return [json.loads(line) for line in (folder / log).read_text().splitlines()]


def compare(name: str, config: dict) -> None:
    """Whole against killed and resumed."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for folder in (one, other):
            Path(folder, "ds_config.json").write_text(json.dumps(config))
        whole = run(Path(one), "whole")
        killed = run(Path(other), "killed", f"--kill_at={KILLED}")
        resumed = run(Path(other), "resumed", f"--load_dir={other}")
    begin = resumed[0][0]
    same = killed == whole[: len(killed)] and resumed == whole[begin:]
    applied, said = sum(ok for *_, ok in whole), "same losses, bit for bit" if same else "LOSSES DIFFER"
    print(
        f"{name}: {len(whole)} micro-batches, {applied} updates applied, loss {whole[0][1]:.4f} -> {whole[-1][1]:.4f};"
        f" killed at {killed[-1][0]}, resumed at {begin}: {said}"
    )
    if not same:
        sys.exit(1)


def main() -> None:
    """The program where a launcher has started it, else the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="what a launcher may pass")
    parser.add_argument("--load_dir", help="go on from a checkpoint of this folder; default: from the start")
    parser.add_argument("--ckpt_id", help="its name; default: the latest")
    parser.add_argument("--save_dir", default="runs/page", help="checkpoints and losses")
    parser.add_argument("--save_interval", type=int, default=INTERVAL, help="micro-batches between two checkpoints")
    parser.add_argument("--losses", default="losses", help="file of losses in save_dir")
    parser.add_argument("--kill_at", type=int, default=-1, help="end with SIGKILL after this micro-batch")
    args = deepspeed.add_config_arguments(parser).parse_args()
    if "RANK" in os.environ:
        Path(args.save_dir).mkdir(parents=True, exist_ok=True)
        return train(args)
    for name, config in (("fp16, ZeRO-1, as on the page", PAGE), ("bf16, ZeRO-2, two micro-batches an update", BF16)):
        compare(name, config)


if __name__ == "__main__":
    main()

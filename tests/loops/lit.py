"""A Trainer or a Fabric that is killed, or that goes on: `lit.py STAGE FOLDER killed|resumed trainer|fabric`."""

import sys
import time
from pathlib import Path

import torch
from same import die, tell

sys.path.insert(0, str(Path(__file__).parents[1]))
import lightnings  # noqa: E402

STAGE, FOLDER, LIFE, LOOP = int(sys.argv[1]), *sys.argv[2:5]
torch.set_num_threads(1)
from funczero.deepspeed.comm import init_distributed  # noqa: E402

init_distributed(verbose=False)


def end(losses):
    tell(FOLDER, killed=losses)
    die()
    time.sleep(60)  # the launcher ends this rank; one that went on would fail first, by the lost connection


if LOOP == "trainer":
    run, half, stop = lightnings.fit, "epoch=0.ckpt", lightnings.EPOCH + 1
else:
    run, half, stop = lightnings.fabric_gan, "half.ckpt", 5
if LIFE == "killed":
    run(STAGE, FOLDER, stop=stop, end=end)
else:
    tell(FOLDER, resumed=run(STAGE, FOLDER, f"{FOLDER}/{half}"))

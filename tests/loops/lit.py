"""A Trainer that is killed, or that goes on: `lit.py STAGE FOLDER killed|resumed`."""

import sys
import time
from pathlib import Path

import torch
from same import die, tell

sys.path.insert(0, str(Path(__file__).parents[1]))
import lightnings  # noqa: E402

STAGE, FOLDER, LIFE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
from funczero.deepspeed.comm import init_distributed  # noqa: E402

init_distributed(verbose=False)


def end(losses):
    tell(FOLDER, killed=losses)
    die()
    time.sleep(60)  # the launcher ends this rank; one that went on would fail first, by the lost connection


if LIFE == "killed":
    lightnings.fit(STAGE, FOLDER, stop=lightnings.EPOCH + 1, end=end)
else:
    tell(FOLDER, resumed=lightnings.fit(STAGE, FOLDER, f"{FOLDER}/epoch=0.ckpt"))

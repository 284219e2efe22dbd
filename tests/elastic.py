"""train_gpt with as many micro-batches an update whatever the world, so that its bits do not depend on how many hosts
are left.
"""

import os
import sys
from pathlib import Path

MICRO_BATCHES = 2
script = Path(__file__).parents[1] / "experiments" / "train_gpt.py"

if __name__ == "__main__":
    os.execv(
        sys.executable,
        [
            sys.executable,
            str(script),
            f"--accumulate={MICRO_BATCHES // int(os.environ.get('WORLD_SIZE', '1'))}",
            *sys.argv[1:],
        ],
    )

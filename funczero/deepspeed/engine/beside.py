"""What an engine keeps in a checkpoint beside the chain's state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funczero.checkpoint import CheckpointError

COUNTS = "micro_steps", "global_samples", "_micro", "_backwards", "_waits"  # of the loop, beside the state's own


def split(found: Any) -> tuple[Any, dict[str, Any]]:
    """The client's part and the engine's; a checkpoint of a plain chain has no engine's.

    Raises:
      CheckpointError: the engine's part holds what no engine wrote.
    """
    if isinstance(found, dict) and found.keys() == {"client", "engine"}:
        return ({} if found["client"] is None else found["client"]), _checked(found["engine"])
    return ({} if found is None else found), {}


def _checked(beside: Any) -> dict[str, Any]:
    count = lambda n: type(n) is int and 0 <= n < 1 << 63
    form = {"counts": dict, "k": int, "taken": int, "buffers": dict, "persistent": list, "frozen": list}
    wrong: str | None = "its form"
    if isinstance(beside, dict):
        wrong = next((k for k, kind in form.items() if k in beside and type(beside[k]) is not kind), None)
    if wrong is None:
        wrong = next((str(n) for n, x in beside.get("counts", {}).items() if n not in COUNTS or not count(x)), None)
    if wrong is None:
        wrong = next((str(n) for n, x in beside.get("buffers", {}).items() if not isinstance(x, Tensor)), None)
    if wrong is not None:
        raise CheckpointError(
            f"load_checkpoint: {wrong[:80]!r} in the engine's part of the checkpoint is nothing that an engine "
            f"writes; it knows the counts {list(COUNTS)}"
        )
    return beside

"""`fz.compile`: a step whose loss and gradient are recorded once, and run as compiled code."""

from __future__ import annotations

from funczero.core.types import ChainError
from funczero.gradients.captured import Capture
from funczero.gradients.compiler import MODES
from funczero.step.step import Step


def compile(step: Step, *, mode: str = "inductor") -> Step:  # noqa: A001
    """The same step, whose loss and gradient are recorded at the first update and run as compiled code from then on.

    Laws: states, batches, metrics, checkpoints and messages are those of the eager step, and a run may go from one to
    the other at any update. "graph" has the eager step's bits. "inductor" fuses operations and adds in other orders:
    another trajectory than the eager step's, with the eager step's own promise (the same bits on 1, 2, 4, ... ranks and
    at every stage), because blocks are compiled one by one and messages stay outside. Draws come from the same keys;
    "inductor" may hand them out to a tensor's elements in another order.

    A recording is of one form of a batch (shapes, dtypes, strides, numbers and text in it) and of what the loss can see
    around itself: closures, globals, attributes of objects and of modules one by one, values of small tensors and
    versions of large ones. Another form is recorded, too, in print. What the loss can see is compared before every
    call, and the loss is recorded again where that has changed. Installed code is taken as fixed. So are a file, the
    time and whatever else an installed function asks of the world, and what a loss prints is printed once.

    A loss that cannot be recorded runs as it is written, and why is said once by each rank, and by print(step): one
    that decides by values, draws from python or numpy, draws in what runs again in the backward
    (torch.utils.checkpoint) or from a state of the generator that it sets, computes with its key as a number, changes
    what it reads, can see what cannot be compared (an iterator, a deque, a lock), sends by itself, holds units open
    (fz.gather), or has an LSTM whose kernel keeps a workspace. step.eval runs as written.

    Every rank compiles when it first sees a form, which takes tens of seconds with "inductor", and less where torch's
    cache on disk has it; like blocks are compiled once. The others wait in their next sum for as long.

    Args:
      step: of value_and_grad; donate it before or afterwards.
      mode: "inductor" compiles with torch's inductor, for which there must be a C++ compiler; "graph" runs the recorded
        operations one by one, which saves little.

    Raises:
      ChainError: nothing of the step can be recorded: a pullback, higher_order, conditional units, SyncBatchNorm.
      ValueError: another mode.

    >>> import torch, funczero as fz
    >>> loss_fn = lambda p, b: (((p["w"] - b) ** 2).sum() / 2, torch.tensor(float(len(b))))
    >>> step = fz.train_step(fz.value_and_grad(loss_fn, batch=fz.P("data")), fz.all_reduce("data"), fz.adamw(0.1))
    >>> fast, state = compile(step, mode="graph"), step.init({"w": torch.zeros(())})
    >>> [run(state, torch.ones(4))[1].loss.item() for run in (step, fast)]
    [0.5, 0.5]
    """
    if mode not in MODES:
        raise ValueError(f"compile: mode={mode!r} is none of {list(MODES)}; write one of them")
    source = step.source
    some = list(source.conditional)
    order = f"conditional={some}: ranks need not run the same blocks, and a recording has one order of them"
    whys = (
        (source.name != "value_and_grad", f"{source.name}: its forward runs elsewhere, and there is nothing to record"),
        ("higher_order" in source.beside, "higher_order: its units run again for every derivative"),
        (bool(some), order),
        (source.synced, "SyncBatchNorm sends inside the forward, and a recording sends at its units alone"),
    )
    for found, why in whys:
        if found:
            raise ChainError(f"compile: {why}; run this step as it is")
    return step.rebuild(capture=Capture(mode))

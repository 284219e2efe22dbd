"""What wall_clock_breakdown and comms_logger print: milliseconds of a loop's three moments, and bytes sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from funczero.deepspeed.config.resolved import Config
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.log import logger
from funczero.deepspeed.engine.monitor import Monitor
from funczero.world.sent import Sent

MOMENTS = {"fwd": "forward", "bwd": "backward", "step": "step"}
EVERY = 10  # updates between two tables of bytes, where steps_per_print says nothing


class Breakdown:
    """Times and bytes of an engine, printed by rank 0.

    On an accelerator every moment ends with a wait for the device, which the config asks for. Gradients travel while
    the backward runs, so a backward is one number: DeepSpeed's bwd_inner and bwd_allreduce have no moments of their own
    here.

    Source: DeepSpeed 0.19.8, utils/timer.py; the tags of runtime/engine.py.
    """

    def __init__(self, config: Config, monitor: Monitor, sent: Callable[[], Sent]) -> None:
        """sent: this process's count of bytes, as it is now."""
        self.times: bool = config.value("wall_clock_breakdown") or config.value("flops_profiler.enabled")
        self.bytes: bool = config.value("comms_logger.enabled")
        self.on = self.times or self.bytes
        self._every, self._monitor, self._sent = config.value("steps_per_print") or EVERY, monitor, sent
        self._speaks, self._before, self._windows = ranks.get_rank() == 0, Sent(), 0
        self._counter = sent()
        self.last: dict[str, float] = {}  # milliseconds of the last whole window, by moment
        self._micro, self._window = (dict.fromkeys(MOMENTS, 0.0) for _ in range(2))  # milliseconds

    def of(self, moment: str) -> AbstractContextManager[None]:
        """While a moment lasts: fwd, bwd or step."""
        return self._timed(moment) if self.times else nullcontext()

    @contextmanager
    def _timed(self, moment: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self._micro[moment] += 1e3 * (time.perf_counter() - begun)

    def stepped(self, last: bool, samples: int, updates: int) -> None:
        """A micro-batch has ended.

        Args:
          last: and with it a window.
          samples: rows seen so far.
          updates: windows closed so far.
        """
        if self.times:
            self._say({f"{name}_microstep": ms for name, ms in self._micro.items()})
            self._window = {name: ms + self._micro[name] for name, ms in self._window.items()}
            self._micro = dict.fromkeys(MOMENTS, 0.0)
            if last:
                self._say(self._window)
                self.last = self._window
                tags = {name: f"Train/Samples/elapsed_time_ms_{said}" for name, said in MOMENTS.items()}
                self._monitor.write_events([(tags[name], ms, samples) for name, ms in self._window.items()])
                self._window = dict.fromkeys(MOMENTS, 0.0)
        if self.bytes and last:
            self._count(updates)

    def _count(self, updates: int) -> None:
        """One more window; now and then a table of what was sent since the last one."""
        now = self._sent()
        if now is not self._counter:  # the engine has another step since its batch is another
            self._counter, self._before, self._windows = now, Sent(), 0
        self._windows += 1
        if updates % self._every == 0:
            if self._speaks:
                what = "sent by rank 0 in the last %d updates, up to %d:\n%s"
                logger.info(what, self._windows, updates, now.since(self._before))
            self._before, self._windows = now.copy(), 0

    def _say(self, times: dict[str, float]) -> None:
        if self._speaks:
            logger.info("time (ms) | %s", " | ".join(f"{name}: {ms:.2f}" for name, ms in times.items()))

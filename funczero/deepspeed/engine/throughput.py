"""Rows a second of an engine's updates, under the names of DeepSpeed's tput_timer."""

from __future__ import annotations

import time


class Throughput:
    """Counts what the engine updates; the first update, which pays for what is built once, is left out."""

    def __init__(self) -> None:
        self.epoch_count = self.global_step_count = 0
        self.total_elapsed_time = 0.0  # seconds, from the end of the first update to the end of the last one
        self._rows, self._began = 0, 0.0

    def updated(self, rows: int) -> None:
        """An update of so many rows has ended."""
        self.global_step_count += 1
        if self.global_step_count == 1:
            self._began = time.perf_counter()
        else:
            self._rows += rows
            self.total_elapsed_time = time.perf_counter() - self._began

    def update_epoch_count(self) -> None:
        """Another pass over the data begins."""
        self.epoch_count += 1

    def avg_samples_per_sec(self) -> float:
        """Rows a second; minus infinity before the second update, as DeepSpeed says."""
        return self._rows / self.total_elapsed_time if self._rows else float("-inf")

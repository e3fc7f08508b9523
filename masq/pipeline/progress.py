"""One line per finished block: what was reached, memory, time left."""

from __future__ import annotations

import logging
import time

import psutil

_LOG = logging.getLogger(__name__)


class BlockClock:
    """Counts blocks of one walk and logs a line for each; plain lines, so that a log file reads well."""

    def __init__(self, title: str, num_blocks: int) -> None:
        self.title = title
        self.num_blocks = num_blocks
        self.done = 0
        self.started = time.perf_counter()

    def tick(self, message: str) -> None:
        """Log that one more block is finished."""
        self.done += 1
        left = (time.perf_counter() - self.started) / self.done * (self.num_blocks - self.done)
        memory = psutil.Process().memory_info().rss / 2**30
        _LOG.info(
            "%s %d/%d | %s | memory %.1f GiB | %.0f s left",
            self.title,
            self.done,
            self.num_blocks,
            message,
            memory,
            left,
        )

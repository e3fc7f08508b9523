"""One line per finished block: what was reached, memory, time left; and its numbers for whoever listens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import psutil

_LOG = logging.getLogger(__name__)

Listener = Callable[[str, int, Mapping[str, float]], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have ``listener`` called with title, index and numbers of every block that is finished in the context."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


class BlockClock:
    """Counts blocks of one walk and logs a line for each; plain lines, so that a log file reads well."""

    def __init__(self, title: str, num_blocks: int) -> None:
        self.title = title
        self.num_blocks = num_blocks
        self.done = 0
        self.started = time.perf_counter()

    def tick(self, message: str, numbers: Mapping[str, float] | None = None) -> None:
        """Log that one more block is finished.

        Args:
            message: what was reached.
            numbers: the same for a machine, by name.
        """
        self.done += 1
        listener = _LISTENER.get()
        if listener is not None and numbers:
            listener(self.title, self.done - 1, numbers)
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

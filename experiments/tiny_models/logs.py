"""Where a stage reports: to the terminal and to a file of its own beside the checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path


def start(work: Path, name: str) -> None:
    """Log to the terminal and, appending across resumes, to ``<work>/logs/<name>.log``."""
    folder = work / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(folder / f"{name}.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)

"""The whole recipe in order; every stage resumes from its own checkpoint, so the command may be repeated."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = "experiments.tiny_models"
STAGES: list[tuple[str, list[str]]] = [
    ("warmup", ["vision", "--work", "{work}"]),
    ("warmup", ["audio", "--work", "{work}"]),
    ("align", ["--oracle", "both", "--work", "{work}", "--batch", "{oracle_batch}", "--steps", "{oracle}"]),
    ("align", ["--frozen", "--work", "{work}", "--threads", "{threads}"]),
    ("align", ["--work", "{work}", "--threads", "{threads}", "--batch", "{joint_batch}", "--steps", "{joint}"]),
    ("export", ["--work", "{work}"]),
    ("evaluate", ["--original", "--threads", "{threads}"]),
]


def main() -> None:
    """Command line: the folder for checkpoints and the number of threads."""
    from . import constants as C

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/train"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    values = {
        "work": str(options.work),
        "threads": str(options.threads),
        "oracle": str(C.ORACLE_STEPS),
        "oracle_batch": str(C.ORACLE_BATCH),
        "joint": str(C.JOINT_STEPS),
        "joint_batch": str(C.JOINT_BATCH),
    }
    # Passive waiting and few returned pages: worth a factor of two on small shared machines, no effect on results.
    kept = "2000000000"
    quiet = {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_THRESHOLD_": kept, "MALLOC_TRIM_THRESHOLD_": kept}
    for module, arguments in STAGES:
        command = [sys.executable, "-m", f"{PACKAGE}.{module}", *(a.format(**values) for a in arguments)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, env={**os.environ, **quiet})


if __name__ == "__main__":
    main()

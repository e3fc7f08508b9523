"""The whole recipe in order; every stage resumes from its own checkpoint, so the command may be repeated."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from . import logs

log = logging.getLogger(__name__)
PACKAGE = "experiments.tiny_models"
# Passive waiting and few returned pages: worth a factor of two on small shared machines, no effect on results.
QUIET = {
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
}


def stages(work: Path, threads: int) -> list[list[list[str]]]:
    """Modules and their arguments in order; those of one entry are independent and run side by side."""
    folder = ["--work", str(work)]
    float_run = ["model=smol_omni", "modality=tri", "scheme=w16a16", "method=none", f"output.root={work / 'float'}"]
    return [
        [[f"{PACKAGE}.warmup", "vision", *folder], [f"{PACKAGE}.warmup", "audio", *folder]],
        [[f"{PACKAGE}.align", *folder, "--threads", str(threads)]],
        [[f"{PACKAGE}.warmup", name, "--polish", *folder] for name in ("vision", "audio")],
        [[f"{PACKAGE}.align", "--second", *folder, "--threads", str(threads)]],
        [[f"{PACKAGE}.export", *folder]],
        [["masq", "run", *float_run]],
        [[f"{PACKAGE}.card", str(work / "float")]],
    ]


def label(command: list[str]) -> str:
    """A stage in a log: its module and what it is told, the folder and threads aside."""
    module, *told = command
    given = told[: told.index("--work")] if "--work" in told else told[: module == "masq"]
    return " ".join([module.removeprefix(f"{PACKAGE}."), *given])


def main() -> None:
    """Command line: the folder for checkpoints and the number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/train"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logs.start(options.work, "recipe")
    for together in stages(options.work, options.threads):
        started = time.time()
        commands = [[sys.executable, "-m", *one] for one in together]
        running = [subprocess.Popen(command, env={**os.environ, **QUIET}) for command in commands]
        for command, process in zip(commands, running, strict=True):
            if process.wait():
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}; repeat the recipe to resume")
        log.info("%s: %.0f s", ", ".join(map(label, together)), time.time() - started)


if __name__ == "__main__":
    main()

"""Runs that are killed while they work, each in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_PROGRAM = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from masq.config import decode
from masq.evaluation.batch_store import BatchStore
from masq.evaluation.harness import require_harnesses
from masq.models.zoo import nano
from masq.pipeline.store import BlockStore
from masq.run import run

def die_after(target, left):
    real = target.save

    def save(self, *args):
        real(self, *args)
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    target.save = save

cells = json.loads(sys.argv[1])
# What takes seconds to import is there before the processes part.
if any(config["evaluation"].get("score", True) for _, _, config in cells):
    require_harnesses()
nano.build("nano_omni")
for where, after, config in cells:
    child = os.fork()
    if child == 0:
        die_after({"block": BlockStore, "batch": BatchStore}[where], after)
        run(decode(config))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def kill_all(cells: Sequence[tuple[str, int, dict[str, Any]]]) -> None:
    """Run cells with one thread and end each by SIGKILL, as the system does it when memory runs out.

    Args:
        cells: what is counted, ``block`` or ``batch``; after how many of them on disk; the configuration.
    """
    command = [sys.executable, "-c", _PROGRAM, json.dumps(list(cells))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == [str(-signal.SIGKILL.value)] * len(cells), done.stderr

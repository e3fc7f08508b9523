"""Seconds and peak memory of quantizing the embedded model with every method, and the share of each stage.

Each method runs in a process of its own, with calibration statistics of no other run, so that its time and its peak of
resident memory are its own. Evaluation is cut to one sample per task and not counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tabulate import tabulate

from masq.files import atomic_write_json, read_json

log = logging.getLogger(__name__)

METHODS = (
    *("rtn", "rtn_clip", "smoothquant", "smoothquant_learned", "awq", "mbq", "gptq", "quarot"),
    *("quarot_gptq", "mas", "masquant", "masquant_gauged", "masquant_paper", "masquant_refcode", "qera"),
    *("masq", "masq_rot"),
)
LEARNED_LIMIT, LIMIT = 300, 120
"""Seconds a learned method, and any other, may take on two cores with 128 samples."""

# Where the time of each stage is spent: functions under the names by which their callers know them.
STAGES = {
    "towers": ["masq.pipeline.loop:capture"],
    "gradients": ["masq.pipeline.loop:gradient_sums"],
    "rotation": ["masq.pipeline.loop:rotate_model"],
    "chains": ["masq.pipeline.chain:advance", "masq.pipeline.learning:run_fake_quantized"],
    "learning": ["masq.pipeline.learning:learn_factors"],
    "statistics": ["masq.calibration.cache:collect"],
    "gauge": ["masq.pipeline.group_input:search_gauge"],
    "remainder": ["masq.pipeline.linears:remainder"],
    "compensation": ["masq.pipeline.linears:second_moments", "masq.pipeline.linears:fit_low_rank"],
}
# Stages that are looked up by kind.
REGISTRIES = {"smoothing": "masq.pipeline.fitting:SMOOTHING", "rounding": "masq.pipeline.linears:ROUNDING"}
REST = "rest"


class Stopwatch:
    """Wall time by stage, own time only: what a stage calls of another stage is the other's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def watch(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted for ``stage``."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._switch(lambda: self._running.append(stage))
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(self._running.pop)

        return watched

    def _switch(self, change: Callable[[], Any]) -> None:
        now = time.perf_counter()
        if self._running:
            stage = self._running[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
        change()


def install(stopwatch: Stopwatch) -> None:
    """Have every stage of this process timed."""
    for stage, targets in STAGES.items():
        for target in targets:
            module, _, name = target.partition(":")
            owner = import_module(module)
            setattr(owner, name, stopwatch.watch(stage, getattr(owner, name)))
    for stage, target in REGISTRIES.items():
        module, _, name = target.partition(":")
        registry = getattr(import_module(module), name)
        get = registry.get
        registry.get = lambda kind, get=get, stage=stage: stopwatch.watch(stage, get(kind))


def measure_one(method: str, scheme: str, samples: int, threads: int | None) -> dict[str, Any]:
    """Quantize once in this process: seconds in all and by stage, and the peak of resident memory in bytes."""
    from masq.compose import compose
    from masq.run import run

    stopwatch = Stopwatch()
    install(stopwatch)
    with tempfile.TemporaryDirectory() as root:
        record = run(compose(overrides(method, scheme, samples, threads, root)))
    parts = ("gradients", "rotate", "learn", "quantize")
    total = sum(record.timings.get(part, 0.0) for part in parts) + stopwatch.seconds.get("towers", 0.0)
    shares = {stage: seconds for stage, seconds in stopwatch.seconds.items() if seconds > 0}
    shares[REST] = max(0.0, total - sum(shares.values()))
    return {
        "method": method,
        "seconds": total,
        "stages": shares,
        "peak_memory_bytes": record.peak_memory_bytes,
        "learned": "learn" in record.timings,
        "provenance": record.provenance,
    }


def overrides(method: str, scheme: str, samples: int, threads: int | None, root: str) -> list[str]:
    """The cell: ``samples`` calibration samples in all, next to no evaluation, nothing from other runs."""
    return [
        *("model=smol_omni", "modality=tri", f"scheme={scheme}", f"method={method}", f"output.root={root}"),
        *("calibration.samples_per_task=null", f"calibration.samples={samples}", "calibration.cache=false"),
        *("evaluation.samples_per_task=1", "evaluation.fidelity_samples_per_task=1"),
        f"threads={'null' if threads is None else threads}",
    ]


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """``measure_one`` in a process of its own.

    Raises:
        RuntimeError: that process failed.
    """
    command = [sys.executable, "-m", "experiments.bench.methods", "--one", method, "--scheme", options.scheme]
    command += ["--samples", str(options.samples)]
    command += [] if options.threads is None else ["--threads", str(options.threads)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{method} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def render(found: dict[str, Any]) -> str:
    """A Markdown table: seconds, the limit, peak memory, and the share of every stage."""
    stages = [*STAGES, *REGISTRIES, REST]
    rows = []
    for cell in found["cells"]:
        limit = LEARNED_LIMIT if cell["learned"] else LIMIT
        shares = [f"{100 * cell['stages'].get(stage, 0.0) / cell['seconds']:.0f} %" for stage in stages]
        memory = f"{cell['peak_memory_bytes'] / 2**30:.1f}"
        rows.append([cell["method"], f"{cell['seconds']:.0f}", limit, memory, *shares])
    headers = ["method", "seconds", "limit", "peak GiB", *stages]
    about = (
        f"{found['scheme']}, {found['samples']} calibration samples, {found['provenance']['threads']} threads on "
        f"{found['provenance']['device_name']}; `python -m experiments.bench.methods`."
    )
    return f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n\n{about}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--scheme", default="w4a6")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=Path("results/bench/methods.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/methods_time.md"))
    parser.add_argument("--one", help="measure one method in this process and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(options.one, options.scheme, options.samples, options.threads)))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found: dict[str, Any] = {"scheme": options.scheme, "samples": options.samples, "cells": []}
    if options.output.exists():
        before = read_json(options.output)
        if (before["scheme"], before["samples"]) == (options.scheme, options.samples):
            found["cells"] = [cell for cell in before["cells"] if cell["method"] not in options.methods]
    for method in options.methods:
        cell = measure(method, options)
        found["provenance"] = cell.pop("provenance")
        found["cells"].append(cell)
        found["cells"].sort(key=lambda one: METHODS.index(one["method"]) if one["method"] in METHODS else len(METHODS))
        atomic_write_json(options.output, found)
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(render(found))
        log.info("%s: %.0f s, %s", method, cell["seconds"], {k: round(v, 1) for k, v in cell["stages"].items()})


if __name__ == "__main__":
    main()

"""What it costs to answer through lmms-eval instead of calling the model on the same batches; start-up is not counted.

Both ways take turns in one process, so that the ratio means the same on any machine.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from masq.calibration.data import batches, load_samples
from masq.compose import compose
from masq.evaluation.config import EvaluationConfig
from masq.evaluation.harness import run_tasks
from masq.files import atomic_write_json
from masq.models.base import ModelAdapter, Sample
from masq.models.loading import load
from masq.models.zoo.smol_omni import data_path
from masq.modules.modality import install
from masq.report.provenance import provenance

log = logging.getLogger(__name__)
TASKS = ("read", "speech", "same")
LIMIT = 1.15
"""Most that the harness may cost, as a multiple of the model's own time."""


def own_seconds(adapter: ModelAdapter, samples: list[Sample], config: EvaluationConfig) -> float:
    """Encode, generate and decode, batch by batch."""
    started = time.perf_counter()
    for group in batches(samples, config.batch_size):
        for ids in adapter.generate(adapter.encode(group, with_answer=False), config.max_new_tokens):
            adapter.decode(ids)
    return time.perf_counter() - started


def harness_seconds(adapter: ModelAdapter, samples: list[Sample], config: EvaluationConfig) -> float:
    """The same answers and their scores through lmms-eval, answers kept on disk."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run_tasks(adapter, samples, config, Path(folder), lambda *_: None)
        return time.perf_counter() - started


def measure(samples_per_task: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of both ways in turn, and the ratio of their medians."""
    adapter = load(compose(["model=smol_omni", "scheme=w16a16", "method=none"]).model)
    install(adapter)
    samples = load_samples(data_path("evaluation"), TASKS, samples_per_task, 0, ("text", "vision", "audio"))
    config = EvaluationConfig(batch_size=batch_size)
    harness_seconds(adapter, samples[: len(samples) // 4], config)  # imports, kernels of every shape
    pairs = [(own_seconds(adapter, samples, config), harness_seconds(adapter, samples, config)) for _ in range(rounds)]
    own, through = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "own_seconds": [a for a, _ in pairs],
        "harness_seconds": [b for _, b in pairs],
        "ratio": through / own,
        "limit": LIMIT,
        "samples": len(samples),
        "batch_size": batch_size,
        "provenance": provenance(0, {}, device="cpu"),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples-per-task", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/bench/harness.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found = measure(options.samples_per_task, options.batch_size, options.rounds)
    atomic_write_json(options.output, found)
    log.info("through the harness: %.2f times the model's own time (limit %.2f)", found["ratio"], LIMIT)


if __name__ == "__main__":
    main()

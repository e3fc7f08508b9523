"""Learned smoothing in batches (``masq.transforms.learned``) against the schedule of MASQuant's released code.

That schedule takes one sample after another, runs the whole block once for every modality in it, as if all its tokens
were of that modality, and makes one step of the optimizer a sample. It is written again here with our loss, rate and
epochs. Both start from the same factors, on float inputs; losses are those of ``learn_factors`` on its batches.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from experiments.walk import FloatWalk
from masq.calibration.replay import BlockData, advance, collect
from masq.compose import compose
from masq.config import RunConfig
from masq.files import atomic_write_json
from masq.models.base import BlockAdapter, Modality
from masq.models.zoo.smol_omni import data_path
from masq.numerics.scheme import Scheme
from masq.transforms.config import LearnedSmoothing
from masq.transforms.fake_quantized import Factors, fake_quantized
from masq.transforms.learned import learn_factors, order_of, weighted_error
from masq.transforms.stages import SMOOTHING

log = logging.getLogger(__name__)

BLOCKS = (2, 12, 22)
OURS, REFERENCE = "batches", "sample by sample"
BATCH = 8


def sample_by_sample(
    block: BlockAdapter, name: str, initial: Factors, data: BlockData, scheme: Scheme, config: LearnedSmoothing
) -> Factors:
    """Learn the factors of one block as the released code does; ``data`` has one sample in each batch."""
    weights = {Modality[key.upper()]: value for key, value in config.loss_weights.items()}
    logs = {g: {m: f.float().log().requires_grad_() for m, f in by.items()} for g, by in initial.items()}
    parameters = [log for by in logs.values() for log in by.values()]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    total = config.epochs * len(data.batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    for epoch in range(config.epochs):
        for index in order_of(len(data.batches), 0, name, epoch):
            optimizer.zero_grad(set_to_none=True)
            sample_loss(block, logs, data, index, scheme, weights).backward()
            optimizer.step()
            schedule.step()
    return {g: {m: log.detach().exp() for m, log in by.items()} for g, by in logs.items()}


def sample_loss(
    block: BlockAdapter, logs: Factors, data: BlockData, index: int, scheme: Scheme, weights: dict[Modality, float]
) -> torch.Tensor:
    """Sum over the modalities of one sample: the whole block with the factors of each, the error of its tokens."""
    batch, terms = data.batches[index], []
    for modality in [m for m in weights if bool((batch.modality == m).any())]:
        own = {group: {Modality.TEXT: by.get(modality, by[Modality.TEXT])} for group, by in logs.items()}
        with fake_quantized(block, own, scheme) as rows:
            rows.set(torch.full_like(batch.modality, int(Modality.TEXT)))
            output = block.forward(data.hidden[index], batch.kwargs)
        error = (output.float() - data.targets[index].float()).abs().mean(-1)
        terms.append(weighted_error(error, batch.modality, {modality: weights[modality]}))
    return torch.stack(terms).sum()


def data_of(block: BlockAdapter, hidden: Sequence[torch.Tensor], walk: FloatWalk, name: str) -> BlockData:
    """Float inputs and float outputs of a block."""
    with torch.no_grad():
        targets = [advance(block, *pair, name) for pair in zip(hidden, walk.replay, strict=True)]
    return BlockData(hidden, targets, walk.replay)


def measure_block(
    block: BlockAdapter, name: str, batches: BlockData, singles: BlockData, config: RunConfig
) -> dict[str, Any]:
    """Seconds and losses of both schedules on one block."""
    scheme, smoothing, seed = config.scheme, config.method.smoothing, config.seed
    assert isinstance(smoothing, LearnedSmoothing)
    statistics = collect(block, batches.hidden, batches.batches, groups=smoothing.groups)
    initial = SMOOTHING.get(smoothing.kind)(block, statistics, smoothing, scheme).factors

    def loss_at(factors: Factors) -> float:
        still = replace(smoothing, epochs=0)
        return learn_factors(block, name, factors, batches, scheme, still, seed=seed).initial_loss

    started = time.perf_counter()
    ours = learn_factors(block, name, initial, batches, scheme, smoothing, seed=seed)
    seconds = {OURS: time.perf_counter() - started}
    started = time.perf_counter()
    theirs = sample_by_sample(block, name, initial, singles, scheme, smoothing)
    seconds[REFERENCE] = time.perf_counter() - started
    return {
        "seconds": seconds,
        "initial_loss": ours.initial_loss,
        "final_loss": {OURS: ours.final_loss, REFERENCE: loss_at(theirs)},
    }


def measure(samples_per_task: int, threads: int) -> dict[str, Any]:
    """Both schedules on some blocks of ``smol_omni``."""
    base = [
        *("model=smol_omni", "modality=tri", "scheme=w4a6", "method=masquant", f"threads={threads}"),
        f"++calibration.samples_per_task={samples_per_task}",
    ]
    torch.set_num_threads(threads)
    configs = [compose([*base, f"++calibration.batch_size={size}"]) for size in (BATCH, 1)]
    walks = [FloatWalk(config, data_path("calibration")) for config in configs]
    found = {}
    for index, ((block, hidden), (_, single)) in enumerate(zip(*(walk.blocks() for walk in walks), strict=True)):
        if index in BLOCKS:
            name = f"block {index}"
            data = [data_of(block, *pair, name) for pair in zip((hidden, single), walks, strict=True)]
            found[str(index)] = measure_block(block, name, data[0], data[1], configs[0])
            log.info("%s %s", name, found[str(index)])
    return {"samples": len(walks[0].samples), "batch": BATCH, "blocks": found, "provenance": walks[0].provenance()}


def render(found: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = []
    for index, one in found["blocks"].items():
        seconds, losses = one["seconds"], one["final_loss"]
        ratio = seconds[REFERENCE] / seconds[OURS]
        rows.append([index, f"{one['initial_loss']:.4f}"])
        rows[-1] += [f"{losses[OURS]:.4f}", f"{losses[REFERENCE]:.4f}"]
        rows[-1] += [f"{seconds[OURS]:.1f}", f"{seconds[REFERENCE]:.1f}", f"{ratio:.1f}"]
    headers = [
        "block",
        "loss at the start",
        OURS,
        REFERENCE,
        f"seconds, {OURS}",
        f"seconds, {REFERENCE}",
        "times faster",
    ]
    made = found["provenance"]
    about = (
        f"`smol_omni` at w4a6, {found['samples']} samples, two epochs, batches of {found['batch']}; "
        f"{made['threads']} thread(s) on {made['device_name']}. `python -m experiments.bench.learning`."
    )
    return f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n\n{about}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=8, help="of each calibration task")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("results/bench/learning.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/learning.md"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found = measure(options.samples, options.threads)
    atomic_write_json(options.output, found)
    options.table.write_text(render(found))
    print(render(found))


if __name__ == "__main__":
    main()

"""The layer gate: every arm on some blocks of an embedded model, on the inputs that the float model gives them.

A block is quantized from calibration samples and measured on others of the same pool: SQNR of the outputs of every
linear, on float inputs, and of the block, by modality. What differs between arms is the method alone. One record per
scheme holds every arm, block and seed; arms that are there already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.beyond import affine
from masq import finished
from masq.calibration.data import batches, dataset_hash, load_samples
from masq.calibration.replay import BlockData, ReplayBatch, advance, capture
from masq.compose import compose
from masq.config import RunConfig, active_modalities
from masq.files import atomic_write_json
from masq.models.base import BlockAdapter, Modality, ModelAdapter, Role, Sample
from masq.models.fingerprint import fingerprint
from masq.models.loading import load
from masq.models.zoo.smol_omni import data_path
from masq.modules.footprint import footprint
from masq.modules.modality import ModalityContext, install
from masq.modules.quant_linear import QuantLinear
from masq.pipeline.assembly import Stages
from masq.pipeline.fitting import Chain, Prepared, quantize_one, token_sample
from masq.pipeline.progress import BlockClock
from masq.pipeline.store import ALL_ROLES
from masq.report.provenance import provenance
from masq.transforms.config import LearnedSmoothing
from masq.transforms.learned import learn_factors
from masq.transforms.rotation import rotate_model
from masq.transforms.stages import SMOOTHING, SmoothingPlan

AFFINE = "affine"
"""The arm that is no composition of stages."""
ARMS = Path(__file__).with_name("arms.yaml")
BLOCKS = (2, 7, 12, 17, 22, 27)
SEEDS = (0, 1, 2)
SAMPLES_PER_TASK = 12
_LOG = logging.getLogger(__name__)


def arms() -> dict[str, list[str]]:
    """Overrides by name."""
    content: dict[str, str] = yaml.safe_load(ARMS.read_text(encoding="utf-8"))
    return {name: overrides.split() for name, overrides in content.items()}


def stages_of(config: RunConfig) -> Stages:
    """The method of a configuration, on the float chain: every arm sees the same inputs."""
    return replace(finished.stages_of(config), chain="float")


@dataclass(frozen=True)
class HeldOut:
    """What a float block reads and gives on samples it is not calibrated on.

    Attributes:
        chain: inputs of the block.
        targets: outputs of the block by batch, [B, T, d].
        linears: by role the inputs [B, T, I] of a linear by batch.
    """

    chain: Chain
    targets: Sequence[torch.Tensor]
    linears: Mapping[Role, Sequence[torch.Tensor]]


class FloatChains:
    """Calibration and held-out samples side by side through the float decoder, rotated where an arm says so.

    Args:
        config: model, modalities, seed of the choice of samples.
        stages: of an arm with the rotation at hand.
    """

    def __init__(self, config: RunConfig, stages: Stages) -> None:
        self.adapter = load(replace(config.model, modalities=active_modalities(config)))
        self.context, _ = install(self.adapter)
        if stages.rotation.kind == "hadamard":
            rotate_model(self.adapter, stages.rotation, stages.seed)
        chosen, others = samples(config)
        self.hashes = {"calibration": dataset_hash(chosen), "held_out": dataset_hash(others)}
        self.calibration, self.held_out = (self._start(one, config.calibration.batch_size) for one in (chosen, others))

    def _start(self, chosen: list[Sample], batch_size: int) -> Chain:
        encoded = [self.adapter.encode(batch, with_answer=True) for batch in batches(chosen, batch_size)]
        return Chain(*capture(self.adapter, encoded))

    def blocks(self, wanted: Sequence[int]) -> Iterator[tuple[int, BlockAdapter, Chain, HeldOut]]:
        """The wanted blocks, float, with what they read."""
        for index, block in enumerate(self.adapter.blocks()[: max(wanted) + 1]):
            if index in wanted:
                yield index, block, self.calibration, observe(block, self.held_out)
            self.calibration = self._advance(block, self.calibration, f"block {index}")
            self.held_out = self._advance(block, self.held_out, f"block {index}")

    def _advance(self, block: BlockAdapter, chain: Chain, name: str) -> Chain:
        pairs = zip(chain.hidden, chain.replay, strict=True)
        return Chain([advance(block, hidden, batch, name) for hidden, batch in pairs], chain.replay)


def samples(config: RunConfig) -> tuple[list[Sample], list[Sample]]:
    """Samples to calibrate on and as many others, of every task, drawn by the seed of the configuration."""
    source, wanted = data_path("calibration"), config.calibration
    modalities = active_modalities(config)
    both, chosen = (
        load_samples(source, wanted.tasks, count * SAMPLES_PER_TASK, config.seed, modalities) for count in (2, 1)
    )
    ids = {one.id for one in chosen}
    return chosen, [one for one in both if one.id not in ids]


@torch.no_grad()
def observe(block: BlockAdapter, chain: Chain) -> HeldOut:
    """Run a float block and keep what its linears read."""
    seen: dict[Role, list[torch.Tensor]] = {role: [] for role in ALL_ROLES}

    def keeps(role: Role) -> Any:
        return lambda _module, args: seen[role].append(args[0].detach())

    handles = [block.linear(role).register_forward_pre_hook(keeps(role)) for role in ALL_ROLES]
    pairs = zip(chain.hidden, chain.replay, strict=True)
    targets = [advance(block, hidden, batch, "held-out") for hidden, batch in pairs]
    for handle in handles:
        handle.remove()
    return HeldOut(chain, targets, seen)


class Sums:
    """Energies of a signal and of an error by modality."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, target: torch.Tensor, found: torch.Tensor, modality: torch.Tensor) -> None:
        """Take in [B, T, O] of both and the modality [B, T]."""
        for which in Modality:
            rows = modality == which
            if which is not Modality.PADDING and bool(rows.any()):
                exact = target[rows].double()
                error = found[rows].double() - exact
                sums = self._sums.setdefault(which.name.lower(), [0.0, 0.0])
                sums[0] += float(exact.square().sum())
                sums[1] += float(error.square().sum())

    def decibels(self) -> dict[str, float]:
        """SQNR."""
        return {name: 10 * math.log10(signal / max(error, 1e-300)) for name, (signal, error) in self._sums.items()}


@torch.no_grad()
def measure(
    block: BlockAdapter, quantized: BlockAdapter, held_out: HeldOut, context: ModalityContext
) -> dict[str, Any]:
    """SQNR in dB on held-out samples: of the block, and of every quantized linear on float inputs."""
    of_block, of_linears = Sums(), {}
    replay = held_out.chain.replay
    for role, inputs in held_out.linears.items():
        layer, sums = quantized.linear(role), Sums()
        if not isinstance(layer, QuantLinear):
            continue
        for x, batch in zip(inputs, replay, strict=True):
            context.set(batch.modality)
            sums.add(block.linear(role)(x), layer(x), batch.modality)
        of_linears[role.value] = sums.decibels()
    for hidden, target, batch in zip(held_out.chain.hidden, held_out.targets, replay, strict=True):
        context.set(batch.modality)
        of_block.add(target, advance(quantized, hidden, batch, "quantized"), batch.modality)
    context.clear()
    return {"block": of_block.decibels(), "linears": of_linears}


def learned(
    block: BlockAdapter,
    index: int,
    chain: Chain,
    replay: Sequence[ReplayBatch],
    stages: Stages,
    context: ModalityContext,
) -> SmoothingPlan:
    """Factors learned on one block from its float inputs."""
    from masq.calibration.cache import Request

    config = stages.smoothing
    assert isinstance(config, LearnedSmoothing)
    targets = []
    for hidden, batch in zip(chain.hidden, replay, strict=True):
        context.set(batch.modality)
        targets.append(advance(block, hidden, batch, f"block {index}"))
    statistics = Request(config.groups).collect(block, chain.hidden, replay)
    initial = SMOOTHING.get(config.kind)(block, statistics, config, stages.scheme).factors
    data = BlockData(chain.hidden, targets, replay)
    found = learn_factors(block, f"block {index}", initial, data, stages.scheme, config, seed=stages.seed)
    logs = found.log_factors
    return SmoothingPlan({group: {m: log.exp() for m, log in by.items()} for group, by in logs.items()})


def run_arm(
    adapter: ModelAdapter,
    index: int,
    block: BlockAdapter,
    chain: Chain,
    held_out: HeldOut,
    stages: Stages,
    context: ModalityContext,
    plans: dict[str, tuple[SmoothingPlan, float]],
) -> dict[str, Any]:
    """Quantize a copy of a float block with one arm, and measure it.

    ``plans`` keeps what was learned and how long it took, by the learning problem, for arms that share it.
    """
    copied = copy.deepcopy(block)
    stages, started, learning = stages.for_block(index, len(adapter.blocks())), time.perf_counter(), 0.0
    prepared = Prepared(sample=token_sample(chain.replay, stages, len(adapter.blocks())))
    if stages.learns:
        key = repr((stages.smoothing, stages.scheme, stages.rotation))
        if key not in plans:
            plans[key] = learned(block, index, chain, chain.replay, stages, context), time.perf_counter() - started
        plan, learning = plans[key]
        prepared = replace(prepared, plans=[plan] * (index + 1))
        started = time.perf_counter()
    note = quantize_one(copied, index, chain, chain, stages, context, prepared)
    seconds = time.perf_counter() - started + learning
    size = footprint([copied]).to_dict()
    note = {key: note[key] for key in ("captured", "gauge", "ranks", "rounding_gain") if key in note}
    return {**measure(block, copied, held_out, context), "seconds": seconds, "bits": size, "note": note}


def run_affine(
    block: BlockAdapter, chain: Chain, held_out: HeldOut, stages: Stages, context: ModalityContext
) -> dict[str, Any]:
    """Learn the affine baseline on a copy of a float block, and measure it; the chain gives its targets."""
    rounded = copy.deepcopy(block)
    quantize_one(rounded, 0, chain, chain, stages, context, Prepared())
    size = footprint([rounded]).to_dict()
    copied, started = copy.deepcopy(block), time.perf_counter()
    pairs = zip(chain.hidden, chain.replay, strict=True)
    targets = [advance(block, hidden, batch, "affine") for hidden, batch in pairs]
    parameters = affine.attach(copied, stages.scheme, stages.seed)
    losses = affine.learn(copied, parameters, chain, targets, affine.EPOCHS)
    found = measure(block, copied, held_out, context)
    seconds = time.perf_counter() - started
    return {**found, "seconds": seconds, "bits": affine.stored_bits(parameters, size), "note": {"losses": losses}}


def missing(record: Mapping[str, Any], names: Sequence[str], blocks: Sequence[int], seed: int) -> dict[str, list[int]]:
    """Blocks that are not in the record, by arm."""
    left = {
        name: [index for index in blocks if str(index) not in record["arms"].get(name, {}).get(str(seed), {})]
        for name in names
    }
    return {name: indices for name, indices in left.items() if indices}


def run(scheme: str, names: Sequence[str], seeds: Sequence[int], blocks: Sequence[int], output: Path) -> None:
    """Every arm that the record lacks; it is written after every block."""
    empty: dict[str, Any] = {"scheme": scheme, "samples_per_task": SAMPLES_PER_TASK, "arms": {}, "provenance": {}}
    record = json.loads(output.read_text()) if output.exists() else empty
    for seed in seeds:
        todo, runs = missing(record, names, blocks, seed), record["provenance"].get(str(seed), [])
        configs = {name: compose([f"scheme={scheme}", f"seed={seed}", *arms()[name]]) for name in todo}
        of_rotation: dict[str, list[str]] = {}
        for name, config in configs.items():
            rotated = config.method.rotation
            of_rotation.setdefault(repr(rotated) if rotated.kind == "hadamard" else "", []).append(name)
        for together in of_rotation.values():
            config = configs[together[0]]
            chains = FloatChains(config, stages_of(config))
            wanted = sorted({index for name in together for index in todo[name]})
            clock = BlockClock(f"{scheme} seed {seed}", len(wanted))
            for index, block, chain, held_out in chains.blocks(wanted):
                plans: dict[str, tuple[SmoothingPlan, float]] = {}
                for name in [name for name in together if index in todo[name]]:
                    stages = stages_of(configs[name])
                    if name == AFFINE:
                        own = stages.for_block(index, len(chains.adapter.blocks()))
                        found = run_affine(block, chain, held_out, own, chains.context)
                    else:
                        found = run_arm(chains.adapter, index, block, chain, held_out, stages, chains.context, plans)
                    record["arms"].setdefault(name, {}).setdefault(str(seed), {})[str(index)] = found
                    _LOG.info("%s %s", name, found["block"])
                hashes = {**chains.hashes, "model": fingerprint(config.model, None)}
                # What was measured before keeps the commit and the machine that measured it.
                record["provenance"][str(seed)] = [*runs, provenance(seed, hashes, device=config.model.device)]
                atomic_write_json(output, record)
                clock.tick("")


def main() -> None:
    """Command line: a scheme, arms, seeds, blocks, where the record goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a6")
    parser.add_argument("--arms", nargs="*", default=list(arms()), choices=list(arms()))
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--blocks", nargs="*", type=int, default=BLOCKS)
    parser.add_argument("--output", type=Path, default=None, help="default: results/beyond/layers-SCHEME.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    output = options.output or Path(f"results/beyond/layers-{options.scheme}.json")
    run(options.scheme, options.arms, options.seeds, options.blocks, output)


if __name__ == "__main__":
    main()

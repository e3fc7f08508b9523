"""The first walk over the decoder: smoothing factors of every block are learned, and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masq.calibration.cache import Request
from masq.calibration.replay import BlockData
from masq.errors import errors_of
from masq.models.base import Modality
from masq.pipeline.chain import block_outputs, mean_sqnr, named, one_of_each_mix, sqnr_text
from masq.pipeline.fitting import Chain, collect_on_float
from masq.pipeline.progress import BlockClock
from masq.transforms.config import LearnedSmoothing
from masq.transforms.fake_quantized import Factors, run_fake_quantized
from masq.transforms.learned import learn_factors
from masq.transforms.stages import SMOOTHING, SmoothingPlan

if TYPE_CHECKING:
    import torch

    from masq.calibration.cache import StatisticsCache
    from masq.calibration.replay import ReplayBatch
    from masq.calibration.statistics import GroupStatistics
    from masq.models.base import BlockAdapter, ModelAdapter
    from masq.models.tensor_files import Collected
    from masq.modules.modality import ModalityContext
    from masq.pipeline.assembly import Stages
    from masq.pipeline.chain import QuantizationReport
    from masq.pipeline.store import BlockStore


def learn(
    adapter: ModelAdapter,
    hidden: Collected,
    replay: list[ReplayBatch],
    stages: Stages,
    context: ModalityContext,
    store: BlockStore,
    cache: StatisticsCache | None,
    report: QuantizationReport,
) -> list[SmoothingPlan]:
    """First walk: factors of every block, on the chain in which each modality has its own weight Q(W s_m).

    Where the stages look at the float chain, every block starts from the float input again.

    Args:
        adapter: the float model.
        hidden: inputs of the first block by batch.
        replay: what else the blocks need.
        stages: the method.
        context: token modalities.
        store: where factors are kept; those that are there are not learned again.
        cache: of statistics of the float chain.
        report: gets the losses.

    Returns:
        The learned smoothing by block.

    Raises:
        NumericalError: NaN or divergence; finished blocks stay in the store.
    """
    num_blocks = len(adapter.blocks())
    walk_needed = not store.has_all(num_blocks)
    new = adapter.residence.collected
    clock = BlockClock("learn smoothing", num_blocks)
    floats = quantized = Chain(hidden, replay)
    plans, shown = [], one_of_each_mix(replay)
    for index, block in enumerate(adapter.visited_blocks() if walk_needed else adapter.blocks()):
        name, own = f"block {index}", stages.for_block(index, num_blocks)
        targets = block_outputs(block, name, floats, context, new()) if walk_needed else floats
        stored, outputs = store.load(index), None
        if stored is None:
            with errors_of(name):
                statistics = _start(block, index, quantized, own, cache)
                data = BlockData(quantized.hidden, targets.hidden, replay, new)
                factors, note, outputs = _learn_one(block, name, statistics, data, own)
            stored = _flatten(factors), note
            store.save(index, *stored)
        logs = _unflatten(stored[0], hidden[0].device)
        plans.append(SmoothingPlan({group: {m: log.exp() for m, log in by.items()} for group, by in logs.items()}))
        report.blocks.append({"index": index, **stored[1]})
        if stored[1].get("reverted"):
            report.warnings.append(f"{name}: learning did not lower the loss, the starting factors were kept")
        if walk_needed:
            if outputs is None:
                outputs = run_fake_quantized(block, name, logs, quantized.hidden, replay, own.scheme, new())
            found = Chain(outputs, replay)
            losses = {key: stored[1][key] for key in ("initial_loss", "final_loss") if key in stored[1]}
            sqnr = mean_sqnr(targets.pick(shown), found.pick(shown))
            text = " -> ".join(f"{loss:.4f}" for loss in losses.values())
            clock.tick(f"{f'loss {text}' if text else 'nothing to learn'} | {sqnr_text(sqnr)}", losses | named(sqnr))
            floats, quantized = targets, targets if stages.smoothing_on_float else found
    return plans


def _start(
    block: BlockAdapter, index: int, inputs: Chain, stages: Stages, cache: StatisticsCache | None
) -> dict[str, GroupStatistics]:
    """Ranges from which the closed form makes the factors that learning starts from."""
    request = Request(() if stages.smoothing.kind == "none" else stages.smoothing.groups)
    if stages.smoothing_on_float:
        return collect_on_float(cache, index, request, block, inputs)
    return request.collect(block, inputs.hidden, inputs.replay)


def _learn_one(
    block: BlockAdapter, name: str, statistics: dict[str, GroupStatistics], data: BlockData, stages: Stages
) -> tuple[Factors, dict[str, Any], Collected | None]:
    """Learn the factors of one block, from those of the closed form on.

    Returns:
        Their logarithms, the losses, and the outputs of the block with them. Nothing of it where no linear in a
        smoothed group is quantized.
    """
    config = stages.smoothing
    if not isinstance(config, LearnedSmoothing):
        return {}, {}, None
    initial = SMOOTHING.get(config.kind)(block, statistics, config, stages.scheme).factors
    found = learn_factors(block, name, initial, data, stages.scheme, config, seed=stages.seed)
    note = {"initial_loss": found.initial_loss, "final_loss": found.final_loss, "reverted": found.reverted}
    return found.log_factors, note, found.outputs


def _flatten(factors: Factors) -> dict[str, torch.Tensor]:
    return {f"{group}.{m.name.lower()}": factor for group, by in factors.items() for m, factor in by.items()}


def _unflatten(tensors: dict[str, torch.Tensor], device: torch.device) -> Factors:
    factors: Factors = {}
    for key in sorted(tensors):
        group, modality = key.split(".")
        factors.setdefault(group, {})[Modality[modality.upper()]] = tensors[key].to(device)
    return factors

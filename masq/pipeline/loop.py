"""Two walks over the decoder: learn smoothing factors, then quantize. No method is named here.

Two chains run side by side: the float chain gives the target of every block, the quantized chain (outputs of the
blocks handled so far) gives its input, so that a block sees the errors of those before it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from masq import parallel
from masq.calibration.replay import capture
from masq.calibration.sensitivity import gradient_sums, mean_gradients, relative_sensitivity
from masq.errors import DataError, errors_of, memory_errors_of
from masq.numerics.scheme import RoundedTowers
from masq.pipeline.chain import (
    QuantizationReport,
    block_outputs,
    mean_sqnr,
    modalities_present,
    named,
    one_of_each_mix,
    sqnr_text,
)
from masq.pipeline.fitting import Chain, Prepared, looked_at, quantize_one, token_sample
from masq.pipeline.learning import learn
from masq.pipeline.progress import BlockClock
from masq.pipeline.store import BlockStore, block_tensors, restore_block
from masq.pipeline.towers import quantize_towers, restore_towers
from masq.transforms.rotation import rotate_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from masq.calibration.cache import StatisticsCache
    from masq.calibration.replay import ReplayBatch
    from masq.models.base import BlockAdapter, EncodedBatch, Modality, ModelAdapter
    from masq.models.tensor_files import Collected
    from masq.modules.modality import ModalityContext
    from masq.pipeline.assembly import Stages
    from masq.transforms.stages import SmoothingPlan


def quantize(
    adapter: ModelAdapter,
    batches: Sequence[EncodedBatch],
    stages: Stages,
    context: ModalityContext,
    *,
    blocks: BlockStore,
    factors: BlockStore,
    gradients: BlockStore | None = None,
    cache: StatisticsCache | None = None,
) -> QuantizationReport:
    """Quantize every decoder block of ``adapter`` in place, after rotating the model where the method says so.

    Args:
        adapter: the float model.
        batches: encoded calibration samples, each asked for when it is needed (``EncodedBatches``).
        stages: the method.
        context: token modalities, installed on the model.
        blocks: where finished blocks are kept; present ones are restored instead of computed.
        factors: where learned factors are kept; shared by all methods with the same learning problem.
        gradients: where gradients that a stage asks for are kept, batch by batch; None to keep none.
        cache: where statistics of the float chain are kept; None to keep none.

    Returns:
        The report of the walk.

    Raises:
        NumericalError: NaN or divergence, naming block and linear; finished blocks stay in the stores.
        DataError: a stored block is damaged.
    """
    report = QuantizationReport()
    sensitivity = _sensitivity(adapter, batches, stages, gradients, report)
    if stages.rotation.kind == "hadamard":
        started = time.perf_counter()
        rotate_model(adapter, stages.rotation, stages.seed)
        report.seconds["rotate"] = time.perf_counter() - started
    if isinstance(stages.towers, RoundedTowers):
        quantize_towers(adapter, stages.towers, blocks.folder)
    with memory_errors_of("the largest tower"):
        hidden, replay = capture(adapter, batches)
    if stages.smoothing.kind != "none" or stages.compensation.kind != "none":
        _warn_about_missing(adapter, replay, report)
    learned: list[SmoothingPlan] | None = None
    if stages.learns:
        started = time.perf_counter()
        learned = learn(adapter, hidden, replay, stages, context, factors, cache, report)
        report.seconds["learn"] = time.perf_counter() - started
    started = time.perf_counter()
    prepared = Prepared(learned, token_sample(replay, stages, len(adapter.blocks())), sensitivity, cache)
    _quantize(adapter, hidden, replay, stages, context, blocks, prepared, report)
    report.seconds["quantize"] = time.perf_counter() - started
    context.clear()
    return report


def restore(adapter: ModelAdapter, stages: Stages, context: ModalityContext, blocks: BlockStore) -> None:
    """Make of a float model the quantized one whose finished blocks are stored, without calibration.

    Args:
        adapter: the float model, changed in place.
        stages: the method and seed that the blocks were made with.
        context: token modalities, installed on the model.
        blocks: where ``quantize`` kept them.

    Raises:
        DataError: a block is missing or damaged.
    """
    if stages.rotation.kind == "hadamard":
        rotate_model(adapter, stages.rotation, stages.seed, blocks_stored=True)
    if isinstance(stages.towers, RoundedTowers):
        restore_towers(adapter, stages.towers, blocks.folder)
    adapter_blocks = adapter.blocks()
    for index, block in enumerate(adapter_blocks):
        fill = _filler(adapter, index, block, stages.for_block(index, len(adapter_blocks)), context, blocks)
        fill()
        adapter.residence.kept(block.module, fill)


def _filler(
    adapter: ModelAdapter, index: int, block: BlockAdapter, stages: Stages, context: ModalityContext, store: BlockStore
) -> Callable[[], None]:
    """What puts a finished block into the model."""
    dtype, device = adapter.embeddings().weight.dtype, adapter.device

    def fill() -> None:
        restore_block(block, _finished(store, index)[0], stages.scheme, context, dtype, device)

    return fill


def _finished(store: BlockStore, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    stored = store.load(index)
    if stored is None:
        raise DataError(
            "every block of a quantized model must be finished",
            value=f"block {index} is missing",
            remedy="let the run finish: masq run with the same configuration goes on where it stopped",
        )
    return stored


def _warn_about_missing(adapter: ModelAdapter, replay: Sequence[ReplayBatch], report: QuantizationReport) -> None:
    seen = modalities_present(replay).any(0)
    for modality in adapter.modalities:
        if not seen[int(modality)]:
            report.warnings.append(
                f"no calibration token of modality {modality.name.lower()}: it uses the factors of text, uncorrected"
            )


def _sensitivity(
    adapter: ModelAdapter,
    batches: Sequence[EncodedBatch],
    stages: Stages,
    store: BlockStore | None,
    report: QuantizationReport,
) -> list[dict[Modality, float]] | None:
    """How much an error of each modality counts in every block of the float model, None where no stage asks."""
    floor = stages.sensitivity_floor
    if floor is None:
        return None
    started = time.perf_counter()
    clock = BlockClock("gradients of batch", len(batches))
    sums = []
    for index in range(len(batches)):
        stored = store.load(index) if store else None
        if stored is None:
            magnitudes, counts = (parallel.summed(one) for one in gradient_sums(adapter, batches[index]))
            if store:
                store.save(index, {"sums": magnitudes, "counts": counts}, {})
        else:
            magnitudes, counts = stored[0]["sums"], stored[0]["counts"]
        sums.append((magnitudes, counts))
        clock.tick(f"{int(counts.sum())} tokens")
    report.seconds["gradients"] = time.perf_counter() - started
    return relative_sensitivity(mean_gradients(sums), floor)


def _quantize(
    adapter: ModelAdapter,
    hidden: Collected,
    replay: list[ReplayBatch],
    stages: Stages,
    context: ModalityContext,
    store: BlockStore,
    prepared: Prepared,
    report: QuantizationReport,
) -> None:
    """Second walk: statistics on the quantized chain, plan, round, correct, replace, advance.

    A chain that no stage learns from is only the yardstick of the progress lines: one batch of every mix of modalities
    is enough.
    """
    num_blocks, new = len(adapter.blocks()), adapter.residence.collected
    clock = BlockClock("quantize", num_blocks)
    shown, everything = one_of_each_mix(replay), list(range(len(replay)))
    kept = [everything if all_of_it else shown for all_of_it in looked_at(stages, prepared, num_blocks)]
    floats, quantized = (Chain(hidden, replay).pick(indices) for indices in kept)
    in_floats, in_quantized = ([indices.index(one) for one in shown] for indices in kept)
    for index, block in enumerate(adapter.visited_blocks()):
        name, own = f"block {index}", stages.for_block(index, num_blocks)
        targets = block_outputs(block, name, floats, context, new())
        stored = store.load(index)
        if stored is None:
            with errors_of(name):
                note = quantize_one(block, index, floats, quantized, own, context, prepared)
        else:
            restore_block(block, stored[0], own.scheme, context, hidden[0].dtype, adapter.device)
            note = stored[1]
        quantized = block_outputs(block, name, quantized, context, new())
        sqnr = mean_sqnr(targets.pick(in_floats), quantized.pick(in_quantized))
        if stored is None:
            store.save(index, block_tensors(block), note)
        adapter.residence.kept(block.module, _filler(adapter, index, block, own, context, store))
        floats = targets
        _merge(report.blocks, index, {"sqnr": sqnr, **note})
        for role, reason in note.get("rounding_fallbacks", {}).items():
            report.warnings.append(f"{name}.{role}: {reason}")
        clock.tick(sqnr_text(sqnr), named(sqnr))


def _merge(blocks: list[dict[str, Any]], index: int, values: dict[str, Any]) -> None:
    if index < len(blocks):
        blocks[index].update(values)
    else:
        blocks.append({"index": index, **values})

"""One block: what its stages asked to see, its smoothing plan, and on to its quantized linears."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from masq.calibration.replay import collect
from masq.calibration.statistics import TokenSample
from masq.pipeline.assembly import Stages, quantize_block
from masq.transforms.config import SearchedSmoothing
from masq.transforms.stages import SMOOTHING, SmoothingPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from masq.calibration.replay import ReplayBatch
    from masq.calibration.statistics import GroupStatistics
    from masq.models.base import BlockAdapter, Modality
    from masq.modules.modality import ModalityContext


@dataclass(frozen=True)
class Chains:
    """Inputs of one block on calibration batches.

    Attributes:
        floats: of the float chain, [B, T, d] by batch; all of them only where a stage looks at that chain.
        quantized: of the quantized chain, [B, T, d] by batch.
        replay: what else the block needs, by batch of the quantized chain.
    """

    floats: Sequence[torch.Tensor]
    quantized: Sequence[torch.Tensor]
    replay: Sequence[ReplayBatch]


@dataclass(frozen=True)
class Prepared:
    """What was found out before the blocks are quantized one by one.

    Attributes:
        plans: learned smoothing by block, None where it is fitted block by block.
        sample: the tokens whose inputs a search of smoothing sees.
        sensitivity: by block, how much an error of each modality counts; None where all count alike.
    """

    plans: Sequence[SmoothingPlan] | None = None
    sample: TokenSample | None = None
    sensitivity: Sequence[Mapping[Modality, float]] | None = None


def token_sample(replay: Sequence[ReplayBatch], stages: Stages, num_blocks: int) -> TokenSample | None:
    """The tokens that a search of smoothing looks at, none of them where second moments tell it all."""
    config = stages.smoothing
    if not isinstance(config, SearchedSmoothing):
        return None
    of_blocks = [stages.for_block(index, num_blocks) for index in range(num_blocks)]
    needs_rows = any(
        set(one.smoothing.groups) - set(one.search_moment_groups) for one in of_blocks if one.smoothing.kind != "none"
    )
    return TokenSample.draw([batch.modality for batch in replay], config.tokens if needs_rows else 0, stages.seed)


def needs_statistics(stages: Stages, prepared: Prepared, num_blocks: int) -> bool:
    """Whether the second walk has to see every batch."""
    if prepared.plans is None and stages.smoothing.kind != "none":
        return True
    return any(stages.for_block(index, num_blocks).second_moment_groups for index in range(num_blocks))


def quantize_one(
    block: BlockAdapter,
    index: int,
    chains: Chains,
    stages: Stages,
    context: ModalityContext,
    prepared: Prepared,
) -> dict[str, Any]:
    """Fit and apply every stage on one block.

    Args:
        block: the float block.
        index: its number.
        chains: its inputs.
        stages: the method on this block.
        context: token modalities for the new linears.
        prepared: learned smoothing, or what a search looks at besides.

    Returns:
        The note of ``quantize_block``, and what a search found.
    """
    moments, of = stages.second_moment_groups, stages.second_moment_modalities
    statistics: dict[str, GroupStatistics] = {}
    if prepared.plans is None:
        statistics = _statistics(block, chains, stages, prepared.sample)
        plan = _fit_smoothing(block, index, statistics, stages, prepared)
    else:
        plan = prepared.plans[index]
        if not stages.uses_float_chain:
            inputs = chains.quantized, chains.replay
            statistics = collect(block, *inputs, groups=(), second_moment=moments, moments_of=of)
    if stages.uses_float_chain:
        statistics = collect(block, chains.floats, chains.replay, groups=(), second_moment=moments, moments_of=of)
    return {**quantize_block(block, f"block {index}", plan, statistics, stages, context), **plan.note}


def _statistics(
    block: BlockAdapter, chains: Chains, stages: Stages, sample: TokenSample | None
) -> dict[str, GroupStatistics]:
    """What smoothing asks to see of the quantized chain, and rounding and compensation unless they look elsewhere."""
    return collect(
        block,
        chains.quantized,
        chains.replay,
        groups=() if stages.smoothing.kind == "none" else stages.smoothing.groups,
        second_moment={
            *stages.search_moment_groups,
            *(() if stages.uses_float_chain else stages.second_moment_groups),
        },
        moments_of=stages.second_moment_modalities,
        sample=sample,
    )


def _fit_smoothing(
    block: BlockAdapter, index: int, statistics: dict[str, GroupStatistics], stages: Stages, prepared: Prepared
) -> SmoothingPlan:
    fit = SMOOTHING.get(stages.smoothing.kind)
    if prepared.sensitivity is None:
        return fit(block, statistics, stages.smoothing, stages.scheme)
    weights = prepared.sensitivity[index]
    weighted = {group: replace(one, sensitivity=weights) for group, one in statistics.items()}
    plan = fit(block, weighted, stages.smoothing, stages.scheme)
    return replace(plan, note={**plan.note, "sensitivity": {which.name.lower(): w for which, w in weights.items()}})

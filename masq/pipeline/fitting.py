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
class SearchInputs:
    """What a search of smoothing looks at besides the statistics of a block.

    Attributes:
        sample: the tokens whose inputs it sees.
        sensitivity: by block, how much an error of each modality counts; empty where all count alike.
    """

    sample: TokenSample | None = None
    sensitivity: Sequence[Mapping[Modality, float]] = ()


def token_sample(replay: Sequence[ReplayBatch], stages: Stages) -> TokenSample | None:
    """The tokens that a search of smoothing looks at, none of them where second moments tell it all."""
    config = stages.smoothing
    if not isinstance(config, SearchedSmoothing):
        return None
    needs_rows = set(config.groups) - set(stages.search_moment_groups)
    return TokenSample.draw([batch.modality for batch in replay], config.tokens if needs_rows else 0, stages.seed)


def needs_statistics(stages: Stages, learned: Sequence[SmoothingPlan] | None) -> bool:
    """Whether the second walk has to see every batch."""
    fits_smoothing = learned is None and stages.smoothing.kind != "none"
    return fits_smoothing or bool(stages.second_moment_groups)


def quantize_one(
    block: BlockAdapter,
    index: int,
    chains: Chains,
    stages: Stages,
    context: ModalityContext,
    plan: SmoothingPlan | None,
    search: SearchInputs,
) -> dict[str, Any]:
    """Fit and apply every stage on one block.

    Args:
        block: the float block.
        index: its number.
        chains: its inputs.
        stages: the method.
        context: token modalities for the new linears.
        plan: learned smoothing, None to fit it here.
        search: what a search looks at besides.

    Returns:
        The note of ``quantize_block``, and what a search found.
    """
    moments, of = stages.second_moment_groups, stages.second_moment_modalities
    statistics: dict[str, GroupStatistics] = {}
    if plan is None:
        smoothed = () if stages.smoothing.kind == "none" else stages.smoothing.groups
        first = {*stages.search_moment_groups, *(() if stages.uses_float_chain else moments)}
        statistics = collect(
            block,
            chains.quantized,
            chains.replay,
            groups=smoothed,
            second_moment=first,
            moments_of=of,
            sample=search.sample,
        )
        weighted = statistics
        if search.sensitivity:
            weighted = {g: replace(one, sensitivity=search.sensitivity[index]) for g, one in statistics.items()}
        plan = SMOOTHING.get(stages.smoothing.kind)(block, weighted, stages.smoothing, stages.scheme)
    elif not stages.uses_float_chain:
        statistics = collect(block, chains.quantized, chains.replay, groups=(), second_moment=moments, moments_of=of)
    if stages.uses_float_chain:
        statistics = collect(block, chains.floats, chains.replay, groups=(), second_moment=moments, moments_of=of)
    return {**quantize_block(block, f"block {index}", plan, statistics, stages, context), **plan.note}

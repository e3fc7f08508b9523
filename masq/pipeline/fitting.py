"""One block: what its stages asked to see, its smoothing plan, and on to its quantized linears."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from masq.calibration.cache import Request, StatisticsCache
from masq.calibration.statistics import TokenSample
from masq.pipeline.assembly import Stages, quantize_block
from masq.transforms.centring import centred
from masq.transforms.config import ConvexModalitySmoothing, SearchedSmoothing
from masq.transforms.stages import SMOOTHING, SmoothingPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from masq.calibration.replay import ReplayBatch
    from masq.calibration.statistics import GroupStatistics
    from masq.models.base import BlockAdapter, Modality
    from masq.modules.modality import ModalityContext


GAUGE_TOKENS = 256
"""At most so many tokens of each modality tell the noise of activations to a search of the gauge."""


@dataclass(frozen=True)
class Chain:
    """Inputs of one block on calibration batches, of the float or of the quantized model.

    Attributes:
        hidden: [B, T, d] by batch; all batches only where a stage looks at that chain.
        replay: what else the block needs, by the same batches.
    """

    hidden: Sequence[torch.Tensor]
    replay: Sequence[ReplayBatch]

    def pick(self, indices: Sequence[int]) -> Chain:
        """Some of the batches."""
        if list(indices) == list(range(len(self.replay))):
            return self
        return Chain([self.hidden[index] for index in indices], [self.replay[index] for index in indices])


@dataclass(frozen=True)
class Prepared:
    """What was found out before the blocks are quantized one by one.

    Attributes:
        plans: learned smoothing by block, None where it is fitted block by block.
        sample: the tokens whose inputs a search of smoothing sees.
        sensitivity: by block, how much an error of each modality counts; None where all count alike.
        cache: where statistics of the float chain are kept, None to keep none.
    """

    plans: Sequence[SmoothingPlan] | None = None
    sample: TokenSample | None = None
    sensitivity: Sequence[Mapping[Modality, float]] | None = None
    cache: StatisticsCache | None = None


def token_sample(replay: Sequence[ReplayBatch], stages: Stages, num_blocks: int) -> TokenSample | None:
    """The tokens that smoothing or its gauge looks at, none of them where second moments tell it all."""
    config = stages.smoothing
    limits = [GAUGE_TOKENS] if stages.groups_with_rows else []
    if isinstance(config, ConvexModalitySmoothing):
        limits.append(config.tokens)
    elif isinstance(config, SearchedSmoothing):
        of_blocks = [stages.for_block(index, num_blocks) for index in range(num_blocks)]
        needs_rows = any(
            set(one.smoothing.groups) - set(one.search_moment_groups)
            for one in of_blocks
            if one.smoothing.kind != "none"
        )
        limits.append(config.tokens if needs_rows else 0)
    if not limits:
        return None
    return TokenSample.draw([batch.modality for batch in replay], max(limits), stages.seed)


def requests(stages: Stages, prepared: Prepared) -> tuple[Request, Request]:
    """What the stages of one block ask of the float chain and of the quantized chain."""
    of = stages.second_moment_modalities
    smoothing = Request()
    if prepared.plans is None and stages.smoothing.kind != "none":
        fits_tokens = isinstance(stages.smoothing, SearchedSmoothing | ConvexModalitySmoothing)
        sample = prepared.sample if fits_tokens else None
        own = [group for group in stages.centred_groups if group in stages.smoothing.groups]
        smoothing = Request(stages.smoothing.groups, stages.search_moment_groups, of, sample, own)
    rows, centres = stages.groups_with_rows, stages.centred_groups
    rest = Request(rows, stages.second_moment_groups, of, prepared.sample if rows else None, centres)
    if stages.smoothing_on_float == stages.moments_on_float:
        both = Request(
            {*smoothing.groups, *rest.groups},
            {*smoothing.second_moment, *rest.second_moment},
            of,
            smoothing.sample or rest.sample,
            centres,
        )
        return (both, Request()) if stages.smoothing_on_float else (Request(), both)
    return rest, smoothing


def looked_at(stages: Stages, prepared: Prepared, num_blocks: int) -> tuple[bool, bool]:
    """Whether the second walk has to see every batch of the float chain, and of the quantized chain."""
    asked = [requests(stages.for_block(index, num_blocks), prepared) for index in range(num_blocks)]
    cache = prepared.cache
    new = [(index, of_float) for index, (of_float, _) in enumerate(asked) if of_float.wanted]
    on_float = any(cache is None or not cache.covers(index, of_float) for index, of_float in new)
    return on_float, any(of_quantized.wanted for _, of_quantized in asked)


def quantize_one(
    block: BlockAdapter,
    index: int,
    floats: Chain,
    quantized: Chain,
    stages: Stages,
    context: ModalityContext,
    prepared: Prepared,
) -> dict[str, Any]:
    """Fit and apply every stage on one block.

    Args:
        block: the float block.
        index: its number.
        floats: its inputs in the float model.
        quantized: its inputs behind the quantized blocks before it.
        stages: the method on this block.
        context: token modalities for the new linears.
        prepared: learned smoothing, or what a search looks at besides.

    Returns:
        The note of ``quantize_block``, and what a search found.
    """
    of_float, of_quantized = requests(stages, prepared)
    whose = stages.centring.modalities if stages.centring.kind != "none" else ()
    in_float = centred(collect_on_float(prepared.cache, index, of_float, block, floats), of_float.centres, whose)
    found = of_quantized.collect(block, quantized.hidden, quantized.replay)
    in_quantized = centred(found, of_quantized.centres, whose)
    smoothing = in_float if stages.smoothing_on_float else in_quantized
    rest = in_float if stages.moments_on_float else in_quantized
    plan = (
        prepared.plans[index]
        if prepared.plans is not None
        else _fit_smoothing(block, index, smoothing, stages, prepared)
    )
    return {**quantize_block(block, f"block {index}", plan, rest, stages, context), **plan.note}


def collect_on_float(
    cache: StatisticsCache | None, index: int, request: Request, block: BlockAdapter, floats: Chain
) -> dict[str, GroupStatistics]:
    """Statistics of the float chain, from the cache where there is one."""
    if cache is None:
        return request.collect(block, floats.hidden, floats.replay)
    return cache.collect(index, request, block, floats.hidden, floats.replay)


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

"""Smoothing stages: from the statistics of a block to a plan, and the one place that applies a folded plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from masq.models.base import GROUPS, Modality, Role
from masq.registry import Registry
from masq.transforms.smoothing import (
    fold_into_norm,
    fold_into_value,
    foldable_factor,
    modality_factors,
    shared_factor,
    tie_to_kv_heads,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from masq.calibration.statistics import GroupStatistics
    from masq.models.base import BlockAdapter
    from masq.transforms.config import (
        LearnedModalitySmoothing,
        LearnedSharedSmoothing,
        ModalitySmoothing,
        NoSmoothing,
        SharedSmoothing,
    )


@dataclass(frozen=True)
class SmoothingPlan:
    """Factors of one block.

    Attributes:
        factors: s_m float32 [d_in] by group and modality; a group without an entry is not smoothed.
        folded: groups whose factor is absorbed by the module before them; the others divide at run time.
    """

    factors: dict[str, dict[Modality, torch.Tensor]] = field(default_factory=dict)
    folded: frozenset[str] = frozenset()


def group_weights(block: BlockAdapter, group: str) -> list[torch.Tensor]:
    """The weights [out, in] that read the input of ``group``."""
    return [block.linear(Role(role)).weight.detach() for role in GROUPS[group]]  # type: ignore[union-attr, misc]


def fit_none(_block: BlockAdapter, _statistics: Mapping[str, GroupStatistics], _config: NoSmoothing) -> SmoothingPlan:
    """No smoothing."""
    return SmoothingPlan()


def fit_shared(
    block: BlockAdapter, statistics: Mapping[str, GroupStatistics], config: SharedSmoothing
) -> SmoothingPlan:
    """One factor for all modalities (SmoothQuant, arXiv 2211.10438; ``source: text`` looks at text tokens alone).

    Groups fed by a norm, and ``output`` through the value linear, are folded when the configuration says so; the
    factor of ``output`` is then tied over the query heads that share a KV head. ``down`` has no linear module
    before it to fold into and divides at run time.
    """
    factors, folded = {}, set()
    for group in config.groups:
        factor = shared_factor(statistics[group], group_weights(block, group), config.alpha, config.source)
        norm = block.norm(group)
        if config.fold and group == "output":
            factor = tie_to_kv_heads(factor, block.num_heads, block.num_kv_heads)
            folded.add(group)
        elif config.fold and norm is not None:
            factor = foldable_factor(norm, factor)
            folded.add(group)
        factors[group] = {modality: factor for modality in Modality if modality is not Modality.PADDING}
    return SmoothingPlan(factors, frozenset(folded))


def fit_modality(
    block: BlockAdapter,
    statistics: Mapping[str, GroupStatistics],
    config: ModalitySmoothing | LearnedModalitySmoothing,
) -> SmoothingPlan:
    """One factor per modality, sqrt(max|x_m| / max|w|) at alpha 0.5 (arXiv 2603.04800, equation 12); never folded."""
    return SmoothingPlan(
        {
            group: modality_factors(statistics[group], group_weights(block, group), config.alpha)
            for group in config.groups
        }
    )


def fit_shared_start(
    block: BlockAdapter, statistics: Mapping[str, GroupStatistics], config: LearnedSharedSmoothing
) -> SmoothingPlan:
    """The shared factor as that of text alone, which every other modality without one of its own takes."""
    return SmoothingPlan(
        {
            group: {Modality.TEXT: shared_factor(statistics[group], group_weights(block, group), config.alpha)}
            for group in config.groups
        }
    )


SMOOTHING: Registry[Callable[..., SmoothingPlan]] = Registry("smoothing stage")
SMOOTHING.register("none", fit_none)
SMOOTHING.register("shared", fit_shared)
SMOOTHING.register("modality", fit_modality)
# Learning starts from the closed form; ``masq.transforms.learned`` does the rest.
SMOOTHING.register("modality_learned", fit_modality)
SMOOTHING.register("shared_learned", fit_shared_start)


@torch.no_grad()
def apply_folds(block: BlockAdapter, plan: SmoothingPlan) -> None:
    """Divide the modules before each folded group by its factor, in place. The linears of the group are not touched.

    Folding changes nothing in exact arithmetic once the linears of the group are multiplied by the same factor.
    """
    for group in sorted(plan.folded):
        factor = plan.factors[group][Modality.TEXT]
        if group == "output":
            fold_into_value(block.linear(Role.VALUE), factor, block.num_heads, block.num_kv_heads)  # type: ignore[arg-type]
        else:
            norm = block.norm(group)
            assert norm is not None
            fold_into_norm(norm, factor)

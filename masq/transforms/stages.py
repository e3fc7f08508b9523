"""Smoothing stages: from the statistics of a block to a plan, and the one place that applies a folded plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from masq.models.base import GROUPS, Modality, Role
from masq.numerics.scheme import GROUP_ROLES
from masq.registry import Registry
from masq.transforms.config import takes_moments
from masq.transforms.convex import convex_factor
from masq.transforms.search import SearchedLinear, awq_factor, pooled_abs_mean, search
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
    from masq.numerics.scheme import Scheme
    from masq.transforms.config import (
        ConvexModalitySmoothing,
        LearnedModalitySmoothing,
        LearnedSharedSmoothing,
        ModalitySmoothing,
        NoSmoothing,
        SearchedSmoothing,
        SharedSmoothing,
    )


@dataclass(frozen=True)
class SmoothingPlan:
    """Factors of one block.

    Attributes:
        factors: s_m float32 [d_in] by group and modality; a group without an entry is not smoothed.
        folded: groups whose factor is absorbed by the module before them; the others divide at run time.
        note: JSON, what a search found; it goes into the record of the block.
    """

    factors: dict[str, dict[Modality, torch.Tensor]] = field(default_factory=dict)
    folded: frozenset[str] = frozenset()
    note: dict[str, Any] = field(default_factory=dict)


def group_weights(block: BlockAdapter, group: str) -> list[torch.Tensor]:
    """The weights [out, in] that read the input of ``group``."""
    return [block.linear(Role(role)).weight.detach() for role in GROUPS[group]]  # type: ignore[union-attr, misc]


def fit_none(
    _block: BlockAdapter,
    _statistics: Mapping[str, GroupStatistics],
    _config: NoSmoothing,
    _scheme: Scheme | None = None,
) -> SmoothingPlan:
    """No smoothing."""
    return SmoothingPlan()


def fit_shared(
    block: BlockAdapter,
    statistics: Mapping[str, GroupStatistics],
    config: SharedSmoothing,
    _scheme: Scheme | None = None,
) -> SmoothingPlan:
    """One factor for all modalities (SmoothQuant, arXiv 2211.10438; ``source: text`` looks at text tokens alone).

    Groups fed by a norm, and ``output`` through the value linear, are folded when the configuration says so; the
    factor of ``output`` is then tied over the query heads that share a KV head. ``down`` has no linear module
    before it to fold into and divides at run time.
    """
    factors, folded = {}, set()
    for group in config.groups:
        factor = shared_factor(statistics[group], group_weights(block, group), config.alpha, config.source)
        if config.fold and folds(block, group):
            factor = as_folded(block, group, factor)
            folded.add(group)
        factors[group] = for_all_modalities(factor)
    return SmoothingPlan(factors, frozenset(folded))


def folds(block: BlockAdapter, group: str) -> bool:
    """Whether a module before ``group`` can absorb its factor."""
    return group == "output" or block.norm(group) is not None


def as_folded(block: BlockAdapter, group: str, factor: torch.Tensor) -> torch.Tensor:
    """The factor [d_in] that the module before ``group`` really absorbs: tied over heads, or exact in its dtype."""
    norm = block.norm(group)
    if group == "output":
        return tie_to_kv_heads(factor, block.num_heads, block.num_kv_heads)
    return factor if norm is None else foldable_factor(norm, factor)


def for_all_modalities(factor: torch.Tensor) -> dict[Modality, torch.Tensor]:
    """One factor for the tokens of every modality."""
    return {modality: factor for modality in Modality if modality is not Modality.PADDING}


def fit_searched(
    block: BlockAdapter, statistics: Mapping[str, GroupStatistics], config: SearchedSmoothing, scheme: Scheme
) -> SmoothingPlan:
    """One factor for all modalities whose exponent is searched on a grid (AWQ, arXiv 2306.00978; MBQ, 2412.19509).

    Every candidate is judged as it would be applied: tied over heads and exact in the norm's dtype where it is folded.
    A group without a quantized linear, and one whose best exponent is 0, is not smoothed.
    """
    factors, folded, found = {}, set(), {}
    for group in config.groups:
        linears = _searched_linears(block, group, scheme)
        if not linears:
            continue
        absorbed = config.fold and folds(block, group)
        mean = pooled_abs_mean(statistics[group])
        exponents = [step / config.steps for step in range(config.steps)]
        candidates = [awq_factor(mean, exponent) for exponent in exponents]
        if absorbed:
            candidates = [as_folded(block, group, candidate) for candidate in candidates]
        best, ratios = search(statistics[group], linears, candidates, config.error)
        found[group] = {"exponent": exponents[best], "error_ratio": ratios}
        if best:
            factors[group] = for_all_modalities(candidates[best])
            folded |= {group} if absorbed else set()
    return SmoothingPlan(factors, frozenset(folded), {"search": found})


def moment_groups(config: SearchedSmoothing, scheme: Scheme) -> tuple[str, ...]:
    """The groups whose search needs second moments and no row: squared errors of the weights alone."""
    formats, found = scheme.formats, []
    for group in config.groups:
        activations = [formats[role].activation for role in GROUP_ROLES[group] if role in formats]
        if activations and takes_moments(config.error, activations):
            found.append(group)
    return tuple(found)


def _searched_linears(block: BlockAdapter, group: str, scheme: Scheme) -> list[SearchedLinear]:
    formats = scheme.formats
    return [
        SearchedLinear(weight, formats[role].weight, formats[role].activation)
        for role, weight in zip(GROUPS[group], group_weights(block, group), strict=True)
        if role in formats
    ]


def fit_modality(
    block: BlockAdapter,
    statistics: Mapping[str, GroupStatistics],
    config: ModalitySmoothing | LearnedModalitySmoothing,
    _scheme: Scheme | None = None,
) -> SmoothingPlan:
    """One factor per modality, sqrt(max|x_m| / max|w|) at alpha 0.5 (arXiv 2603.04800, equation 12); never folded."""
    return SmoothingPlan(
        {
            group: modality_factors(statistics[group], group_weights(block, group), config.alpha)
            for group in config.groups
        }
    )


def fit_convex(
    block: BlockAdapter, statistics: Mapping[str, GroupStatistics], config: ConvexModalitySmoothing, scheme: Scheme
) -> SmoothingPlan:
    """One factor per modality, or one for all, the optimum of a convex error model on sampled tokens; never folded.

    The scale that the model leaves open is set so that every factor has geometric mean 1. For a shared factor relative
    errors of the modalities count alike: their rows are brought to one root mean square.
    """
    factors = {}
    for group in config.groups:
        linears = _searched_linears(block, group, scheme)
        if linears:
            rows = statistics[group].rows
            if group in config.shared:
                rows = {Modality.TEXT: torch.cat([one / _root_mean_square(one) for one in rows.values()])}
            found = {m: convex_factor(one, linears, config.power, config.steps) for m, one in rows.items()}
            factors[group] = for_all_modalities(found[Modality.TEXT]) if group in config.shared else found
    return SmoothingPlan(factors)


def _root_mean_square(rows: torch.Tensor) -> float:
    """Of rows [n, I]; 1 for rows of zeros."""
    return float(rows.double().square().mean().sqrt()) or 1.0


def fit_shared_start(
    block: BlockAdapter,
    statistics: Mapping[str, GroupStatistics],
    config: LearnedSharedSmoothing,
    _scheme: Scheme | None = None,
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
SMOOTHING.register("modality_convex", fit_convex)
# Learning starts from the closed form; ``masq.transforms.learned`` does the rest.
SMOOTHING.register("modality_learned", fit_modality)
SMOOTHING.register("shared_learned", fit_shared_start)
SMOOTHING.register("awq", fit_searched)
SMOOTHING.register("mbq", fit_searched)


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

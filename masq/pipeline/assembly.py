"""One block from float to quantized: fold, round, correct, replace."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from masq.compensation.low_rank import captured_share, fit_low_rank, resolve_rank, scaled_covariance
from masq.errors import NumericalError
from masq.models.base import GROUPS, Modality, Role
from masq.modules.quant_linear import QuantLinear
from masq.numerics.linalg import Whitener, whitener
from masq.numerics.low_rank import Factors, store
from masq.numerics.scheme import GROUP_ROLES
from masq.rounding.stages import ROUNDING, Rounded, pooled_moment
from masq.transforms.config import MbqSmoothing, NoRotation, NoSmoothing, SearchedSmoothing
from masq.transforms.smoothing import match_scale
from masq.transforms.stages import apply_folds, moment_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from masq.calibration.statistics import GroupStatistics
    from masq.compensation.config import NoCompensation, WhitenedLowRank
    from masq.models.base import BlockAdapter
    from masq.modules.modality import ModalityContext
    from masq.numerics.affine import QuantizedTensor
    from masq.numerics.scheme import Scheme
    from masq.rounding.config import GptqRounding, NearestRounding
    from masq.transforms.config import Rotation, Smoothing
    from masq.transforms.stages import SmoothingPlan


@dataclass(frozen=True)
class Stages:
    """A method: one configuration per slot, the number formats and the seed of every random stream.

    ``chain`` tells whose activations the stages look at (``CalibrationConfig``). What depends on formats is asked of
    ``for_block``.
    """

    smoothing: Smoothing
    rounding: NearestRounding | GptqRounding
    compensation: NoCompensation | WhitenedLowRank
    scheme: Scheme
    seed: int = 0
    rotation: Rotation = NoRotation()
    chain: Literal["quantized", "float"] = "quantized"

    def for_block(self, index: int, num_blocks: int) -> Stages:
        """The method on one block: its own formats, and smoothing of groups that have a quantized linear there."""
        scheme, smoothing = self.scheme.for_block(index, num_blocks), self.smoothing
        if smoothing.kind != "none":
            groups = tuple(group for group in smoothing.groups if set(GROUP_ROLES[group]) & set(scheme.formats))
            if not groups:
                smoothing = NoSmoothing()
            elif groups != smoothing.groups:
                smoothing = replace(smoothing, groups=groups)
        return replace(self, scheme=scheme, smoothing=smoothing)

    @property
    def learns(self) -> bool:
        """Whether smoothing factors are learned in a walk of their own."""
        return self.smoothing.kind in ("modality_learned", "shared_learned")

    @property
    def sensitivity_floor(self) -> str | None:
        """The floor of sensitivities by modality (see ``MbqSmoothing``), None where no stage asks for them."""
        return self.smoothing.floor if isinstance(self.smoothing, MbqSmoothing) else None

    @property
    def search_moment_groups(self) -> tuple[str, ...]:
        """Groups whose second moments a search of smoothing needs, where they tell it all."""
        return moment_groups(self.smoothing, self.scheme) if isinstance(self.smoothing, SearchedSmoothing) else ()

    @property
    def compensated_groups(self) -> tuple[str, ...]:
        """Groups that get low-rank corrections, and so need second moments."""
        if self.compensation.kind == "none":
            return ()
        return tuple(group for group in self.compensation.groups if set(GROUP_ROLES[group]) & set(self.scheme.formats))

    @property
    def rounds_against_input(self) -> bool:
        """Whether rounding looks at the second moment of what a linear reads."""
        return self.rounding.kind != "nearest" or self.rounding.clip is not None

    @property
    def second_moment_groups(self) -> tuple[str, ...]:
        """Groups whose second moments a stage asks for: to correct them, or to round against them."""
        if not self.rounds_against_input:
            return self.compensated_groups
        return tuple(group for group, roles in GROUP_ROLES.items() if set(roles) & set(self.scheme.formats))

    @property
    def second_moment_modalities(self) -> tuple[Modality, ...]:
        """Whose second moments: rounding and a search look at every token, a correction at those of its modality."""
        wanted = {m for m in Modality if m is not Modality.PADDING}
        if not self.search_moment_groups:
            if not self.rounds_against_input:
                wanted -= {Modality.TEXT}
            elif self.compensation.kind == "none":
                wanted &= set(self.rounding_modalities)
        return tuple(sorted(wanted))

    @property
    def rounding_modalities(self) -> tuple[Modality, ...]:
        """Whose tokens a rounding stage looks at where one weight serves all modalities."""
        text_only = self.rounding.kind == "gptq" and self.rounding.tokens == "text"
        return (Modality.TEXT,) if text_only else tuple(Modality)

    @property
    def stores_weight_per_modality(self) -> bool:
        """Whether every modality has a rounded weight of its own."""
        return self.rounding.kind == "nearest" and self.rounding.per_modality

    def rounding_of(self, role: Role) -> NearestRounding | GptqRounding:
        """The rounding of one linear: a clip search that leaves it out is not there."""
        clip = self.rounding.clip
        return self.rounding if clip is None or role in clip.roles else replace(self.rounding, clip=None)

    @property
    def moments_on_float(self) -> bool:
        """Whether second moments come from the float model's activations."""
        own = self.compensation.kind != "none" and self.compensation.activations == "float"
        return own or self.smoothing_on_float

    @property
    def smoothing_on_float(self) -> bool:
        """Whether smoothing looks at the float model's activations."""
        return self.chain == "float"


@torch.no_grad()
def quantize_block(
    block: BlockAdapter,
    name: str,
    plan: SmoothingPlan,
    statistics: Mapping[str, GroupStatistics],
    stages: Stages,
    context: ModalityContext,
) -> dict[str, Any]:
    """Replace the linears of a block by quantized ones.

    Args:
        block: float block; norms and the value linear may be folded in place.
        name: block name for errors.
        plan: smoothing factors.
        statistics: by group, second moments where a stage asks for them.
        stages: the method on this block.
        context: token modalities for the new linears.

    Returns:
        JSON: ``captured``, the share of the whitened weight error that corrections capture, mean over linears, by
        modality; for a stage that rounds against the input also ``rounding_gain``, the mean ratio of its error to that
        of rounding to nearest, ``rounding_fallbacks``, by role, what could not be done as configured, and
        ``rounding``, by role, that and the numbers behind it (see ``Rounded``).

    Raises:
        NumericalError: a weight, factor or correction is not finite; the message names the linear.
    """
    apply_folds(block, plan)
    captured: dict[str, list[float]] = {}
    rounded: dict[str, Rounded] = {}
    formats = stages.scheme.formats
    for group, roles in GROUPS.items():
        factors = _scaled_factors(plan.factors.get(group, {}), stages)
        roots = _whiteners(statistics[group], factors, stages) if group in stages.compensated_groups else {}
        moments = _moments(group, statistics, factors, stages)
        for role in map(Role, roles):
            linear = block.linear(role)
            assert isinstance(linear, torch.nn.Linear)
            if role not in formats:
                if group in plan.folded:
                    linear.weight.mul_(factors[Modality.TEXT].to(linear.weight))
                continue
            made = _Linear(linear, role, f"{name}.{role}", factors, group in plan.folded)
            layer, shares, rounded[role] = _quantize_linear(made, moments, roots, stages, context)
            block.set_linear(role, layer)
            for modality, share in shares.items():
                captured.setdefault(modality.name.lower(), []).append(share)
    note: dict[str, Any] = {"captured": {key: sum(shares) / len(shares) for key, shares in captured.items()}}
    if stages.rounds_against_input and rounded:
        note["rounding_gain"] = sum(one.gain for one in rounded.values()) / len(rounded)
        note["rounding_fallbacks"] = {role: one.fallback for role, one in rounded.items() if one.fallback}
        note["rounding"] = {role: one.to_dict() for role, one in rounded.items()}
    return note


def _scaled_factors(factors: Mapping[Modality, torch.Tensor], stages: Stages) -> Mapping[Modality, torch.Tensor]:
    """Factors of a group in the gauge that the compensation asks for."""
    if stages.compensation.kind != "none" and stages.compensation.gauge == "text":
        return match_scale(factors)
    return factors


def _moments(
    group: str,
    statistics: Mapping[str, GroupStatistics],
    factors: Mapping[Modality, torch.Tensor],
    stages: Stages,
) -> dict[Modality, torch.Tensor | None]:
    """The second moment of the smoothed input that the stored weight of each modality is rounded against."""
    if not stages.rounds_against_input or group not in stages.second_moment_groups:
        return {}
    if stages.stores_weight_per_modality:
        return {m: pooled_moment(statistics[group], factors, (m,)) for m in factors or (Modality.TEXT,)}
    return {Modality.TEXT: pooled_moment(statistics[group], factors, stages.rounding_modalities)}


def _whiteners(
    statistics: GroupStatistics, factors: Mapping[Modality, torch.Tensor], stages: Stages
) -> dict[Modality, Whitener]:
    """Square roots of C_m for the modalities to correct: one eigendecomposition for all linears of a group."""
    assert stages.compensation.kind != "none"
    roots = {}
    for modality, moment in statistics.second_moment.items():
        if modality is not Modality.TEXT:
            covariance = scaled_covariance(moment, _factor(factors, modality, moment.shape[0], moment.device))
            roots[modality] = whitener(covariance, stages.compensation.damping)
    return roots


def _factor(
    factors: Mapping[Modality, torch.Tensor], modality: Modality, size: int, device: torch.device
) -> torch.Tensor:
    """s_m as float64 [d_in]: the modality's own, else text's, else one."""
    factor = factors.get(modality, factors.get(Modality.TEXT))
    return torch.ones(size, dtype=torch.float64, device=device) if factor is None else factor.double()


@dataclass(frozen=True)
class _Linear:
    """A float linear on its way: role, name for errors, factors s_m of its input, and whether they are folded."""

    module: torch.nn.Linear
    role: Role
    name: str
    factors: Mapping[Modality, torch.Tensor]
    folded: bool


def _quantize_linear(
    made: _Linear,
    moments: Mapping[Modality, torch.Tensor | None],
    roots: Mapping[Modality, Whitener],
    stages: Stages,
    context: ModalityContext,
) -> tuple[QuantLinear, dict[Modality, float], Rounded]:
    """The quantized linear, the captured shares of its corrections, and how the weight of text was rounded."""
    linear, name, factors, folded = made.module, made.name, made.factors, made.folded
    weight_oi = linear.weight.detach().double()
    _require_finite(weight_oi, name, "weight")
    fmt = stages.scheme.formats[made.role]
    present = tuple(factors) or (Modality.TEXT,)
    smoothed = {m: weight_oi * _factor(factors, m, linear.in_features, weight_oi.device) for m in (*present, *roots)}
    stored = present if stages.stores_weight_per_modality else (Modality.TEXT,)
    stage, config = ROUNDING.get(stages.rounding.kind), stages.rounding_of(made.role)
    rounded = {m: stage(smoothed[m], fmt.weight, config, moments.get(m)) for m in stored}
    weights = {m: one.weight for m, one in rounded.items()}
    corrections, shares = _corrections(smoothed, weights[Modality.TEXT], roots, stages)
    for tensor in itertools.chain.from_iterable(corrections.values()):
        if tensor is not None:
            _require_finite(tensor, name, "correction")
    layer = QuantLinear(
        weights=weights,
        bias=linear.bias,
        activation=fmt.activation,
        context=context,
        smoothing=None if folded or not factors else factors,
        corrections=corrections,
        dtype=linear.weight.dtype,
    )
    return layer, shares, rounded[Modality.TEXT]


def _corrections(
    smoothed: Mapping[Modality, torch.Tensor],
    base: QuantizedTensor,
    roots: Mapping[Modality, Whitener],
    stages: Stages,
) -> tuple[dict[Modality, Factors], dict[Modality, float]]:
    """Equation 22: rank-r fit of W s_m - W_hat for every corrected modality, and the share of it that is captured.

    That of codes is what they capture; 16 bits are as good as the fit.
    """
    config, corrections, shares = stages.compensation, {}, {}
    if config.kind == "none" or not roots:
        return corrections, shares
    base_oi = base.dequantize(torch.float64)
    rank = resolve_rank(config, base_oi.shape[1], base_oi.shape[0])
    for modality, root in roots.items():
        residual = smoothed[modality] - base_oi
        fit = fit_low_rank(residual, root, rank, whiten=config.whiten)
        shares[modality] = float(fit.captured)
        if rank:
            corrections[modality] = store(fit.left, fit.right, getattr(torch, config.dtype))
            if config.dtype == "int8":
                shares[modality] = captured_share(residual, root, *corrections[modality].dense())
    return corrections, shares


def _require_finite(tensor: torch.Tensor, name: str, what: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NumericalError(
            f"the {what} of {name} must be finite",
            value="NaN or infinity",
            remedy="check the checkpoint, or raise method.compensation.damping; finished blocks are kept",
        )

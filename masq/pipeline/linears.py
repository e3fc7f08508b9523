"""The linears of one group on their way from float to quantized: choose the factors, round, correct.

Shapes: I input channels, O output channels, R rank, n sampled tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from masq.compensation.gauge import GaugedLinear, PostCorrectionError, search_gauge
from masq.compensation.low_rank import captured_share, fit_low_rank, resolve_rank, scaled_covariance
from masq.compensation.ranks import Candidate, fill
from masq.errors import NumericalError
from masq.models.base import GROUPS, Modality, Role
from masq.modules.quant_linear import QuantLinear
from masq.numerics.hadamard import random_signs, rotate
from masq.numerics.linalg import Whitener, whitener
from masq.numerics.low_rank import Factors, store
from masq.rounding.nearest import round_nearest
from masq.rounding.remainder import remainder
from masq.rounding.stages import ROUNDING, Rounded, pooled_moment
from masq.transforms.smoothing import match_scale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from masq.calibration.statistics import GroupStatistics
    from masq.compensation.config import NoCompensation, WhitenedLowRank
    from masq.models.base import BlockAdapter
    from masq.modules.modality import ModalityContext
    from masq.numerics.scheme import LinearFormat
    from masq.pipeline.assembly import Stages
    from masq.transforms.stages import SmoothingPlan


@dataclass(frozen=True, eq=False)
class _Input:
    """What the linears of a group share: the input they read, as it is going to be smoothed and rotated.

    Attributes:
        factors: s_m by modality, none for no smoothing.
        folded: whether a module before the group absorbs them.
        signs: of the rotation behind smoothing, [I], None for none.
        statistics: of the raw input; empty where no stage asks for any.
    """

    factors: Mapping[Modality, torch.Tensor]
    folded: bool
    signs: torch.Tensor | None
    statistics: GroupStatistics | None

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """The rotation behind smoothing, along the last dimension."""
        return x if self.signs is None else rotate(x, self.signs)

    def factor(self, modality: Modality, weight: torch.Tensor) -> torch.Tensor:
        """s_m as float64 [I]: the modality's own, else text's, else one."""
        factor = self.factors.get(modality, self.factors.get(Modality.TEXT))
        if factor is None:
            return torch.ones(weight.shape[-1], dtype=torch.float64, device=weight.device)
        return factor.double()

    def smoothed(self, weight: torch.Tensor, modality: Modality) -> torch.Tensor:
        """What stands for a weight behind the smoothed and rotated input: W s_m R, float64 [O, I]."""
        return self.turn(weight * self.factor(modality, weight))

    def covariance(self, modality: Modality) -> torch.Tensor:
        """Second moment of the smoothed and rotated input, float64 [I, I]."""
        assert self.statistics is not None
        moment = self.statistics.second_moment[modality]
        return self.turned_moment(scaled_covariance(moment, self.factor(modality, moment)))

    def turned_moment(self, moment: torch.Tensor) -> torch.Tensor:
        """R^T C R, exactly symmetric."""
        if self.signs is None:
            return moment
        turned = self.turn(self.turn(moment).t())
        return (turned + turned.t()) / 2


@dataclass(eq=False)
class Draft:
    """A linear that is rounded and not yet corrected.

    Attributes:
        linear: the float linear.
        role: which it is.
        name: for errors.
        fmt: its number formats.
        reads: its input.
        rounded: stored weights by modality, of text at least.
        roots: square roots of the second moments of those modalities that are corrected.
    """

    linear: torch.nn.Linear
    role: Role
    name: str
    fmt: LinearFormat
    reads: _Input
    rounded: Mapping[Modality, Rounded]
    roots: Mapping[Modality, Whitener] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[int, int]:
        """Input and output channels."""
        return self.linear.in_features, self.linear.out_features

    def residual(self, modality: Modality) -> torch.Tensor:
        """W s_m - W_hat, float64 [O, I]."""
        base = self.rounded[Modality.TEXT].weight.dequantize(torch.float64)
        return self.reads.smoothed(self.linear.weight.detach().double(), modality) - base

    def layer(self, corrections: Corrections, context: ModalityContext) -> QuantLinear:
        """The quantized linear."""
        for tensor in itertools.chain.from_iterable(corrections.factors.values()):
            if tensor is not None:
                _require_finite(tensor, self.name, "correction")
        return QuantLinear(
            weights={m: one.weight for m, one in self.rounded.items()},
            bias=self.linear.bias,
            activation=self.fmt.activation,
            context=context,
            smoothing=None if self.reads.folded or not self.reads.factors else self.reads.factors,
            rotation=self.reads.signs,
            corrections=corrections.factors,
            dtype=self.linear.weight.dtype,
        )

    def release(self) -> None:
        """Forget the square roots, which are large."""
        self.roots = {}


@dataclass(frozen=True, eq=False)
class Corrections:
    """Corrections of one linear.

    Attributes:
        factors: as they are stored, by modality; none of rank 0.
        shares: of the whitened weight error, what they capture.
    """

    factors: Mapping[Modality, Factors]
    shares: Mapping[Modality, float]

    @classmethod
    def fit(cls, draft: Draft, ranks: Mapping[Modality, int], config: NoCompensation | WhitenedLowRank) -> Corrections:
        """Equation 22: rank-r fit of W s_m - W_hat for every corrected modality, and the share of it that is captured.

        That of codes is what they capture; 16 bits are as good as the fit.
        """
        factors: dict[Modality, Factors] = {}
        shares: dict[Modality, float] = {}
        if config.kind == "none":
            return cls(factors, shares)
        for modality, root in draft.roots.items():
            residual, rank = draft.residual(modality), ranks[modality]
            fit = fit_low_rank(residual, root, rank, whiten=config.whiten)
            shares[modality] = float(fit.captured)
            if rank:
                factors[modality] = store(fit.left, fit.right, getattr(torch, config.dtype))
                if config.dtype == "int8":
                    shares[modality] = captured_share(residual, root, *factors[modality].dense())
        return cls(factors, shares)


def draft_group(
    block: BlockAdapter,
    name: str,
    group: str,
    plan: SmoothingPlan,
    statistics: Mapping[str, GroupStatistics],
    stages: Stages,
) -> tuple[list[Draft], dict[str, Any]]:
    """Round the quantized linears of a group; one that stays float is multiplied by a factor that was folded.

    Returns:
        The linears in the order of the block, and what a search of the gauge found, by modality.
    """
    formats, folded = stages.scheme.formats, group in plan.folded
    reads = _Input(
        _scaled_factors(plan.factors.get(group, {}), stages), folded, _signs(block, name, group, stages),
        statistics.get(group),
    )  # fmt: skip
    quantized: list[tuple[Role, torch.nn.Linear]] = []
    for role in map(Role, GROUPS[group]):  # pyright: ignore[reportArgumentType]
        linear = block.linear(role)
        assert isinstance(linear, torch.nn.Linear)
        if role in formats:
            _require_finite(linear.weight, f"{name}.{role}", "weight")
            quantized.append((role, linear))
        elif folded:
            linear.weight.mul_(reads.factors[Modality.TEXT].to(linear.weight))
    found: dict[str, Any] = {}
    if quantized and group in stages.gauged_groups:
        reads, found = _gauged(reads, quantized, stages)
    roots = _whiteners(reads, stages) if group in stages.compensated_groups else {}
    moments = _moments(group, reads, stages)
    drafts = [_draft(linear, role, f"{name}.{role}", reads, moments, roots, stages) for role, linear in quantized]
    return drafts, found


def equal_ranks(drafts: Sequence[Draft], stages: Stages) -> dict[Role, dict[Modality, int]]:
    """The rank that the configuration says, for every corrected modality of every linear."""
    config = stages.compensation
    if config.kind == "none":
        return {one.role: {} for one in drafts}
    return {one.role: dict.fromkeys(one.roots, resolve_rank(config, *one.sides)) for one in drafts}


def filled_ranks(drafts: Sequence[Draft], stages: Stages) -> dict[Role, dict[Modality, int]]:
    """Ranks within the bytes of equal ones, by how much each component takes of the relative error of the outputs."""
    equal = equal_ranks(drafts, stages)
    budget = sum(rank * sum(one.sides) for one in drafts for rank in equal[one.role].values())
    candidates = [
        Candidate((one.role, modality), _gains(one, modality, root), sum(one.sides))
        for one in drafts
        for modality, root in one.roots.items()
    ]
    filled = fill(candidates, budget)
    return {one.role: {m: filled[one.role, m] for m in one.roots} for one in drafts}


def _gains(draft: Draft, modality: Modality, root: Whitener) -> list[float]:
    """Squared whitened singular values of the weight error relative to the energy of the outputs, descending."""
    whitened = root.sqrt @ draft.residual(modality).t()
    gram = whitened.t() @ whitened if whitened.shape[0] > whitened.shape[1] else whitened @ whitened.t()
    smoothed = draft.reads.smoothed(draft.linear.weight.detach().double(), modality)
    energy = float((root.sqrt @ smoothed.t()).square().sum())
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return (values / energy).tolist() if energy > 0 else [0.0] * len(values)


def _signs(block: BlockAdapter, name: str, group: str, stages: Stages) -> torch.Tensor | None:
    """Random signs of a rotation behind smoothing, of a stream of their own; None without one."""
    if stages.rotation.kind != "hadamard_smoothed" or group not in stages.rotation.groups:
        return None
    weight = block.linear(Role(GROUPS[group][0])).weight  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert isinstance(weight, torch.Tensor)
    return random_signs(weight.shape[1], stages.seed, "rotation", name, group).float().to(weight.device)


def _scaled_factors(factors: Mapping[Modality, torch.Tensor], stages: Stages) -> Mapping[Modality, torch.Tensor]:
    """Factors of a group in the gauge that the compensation asks for."""
    if stages.compensation.kind != "none" and stages.compensation.gauge == "text":
        return match_scale(factors)
    return factors


def _gauged(
    reads: _Input, quantized: Sequence[tuple[Role, torch.nn.Linear]], stages: Stages
) -> tuple[_Input, dict[str, Any]]:
    """The input with the factor of every corrected modality chosen by the error that its correction leaves.

    Weights are rounded to nearest for the choice: how they are rounded in the end depends on it.
    """
    config, statistics = stages.compensation, reads.statistics
    assert config.kind != "none"
    assert statistics is not None
    linears = []
    for role, linear in quantized:
        weight, fmt = linear.weight.detach().double(), stages.scheme.formats[role]
        stored = round_nearest(reads.smoothed(weight, Modality.TEXT), fmt.weight).dequantize(torch.float64)
        rank = resolve_rank(config, linear.in_features, linear.out_features)
        linears.append(GaugedLinear(weight, stored, rank, fmt.activation))
    factors, found = dict(reads.factors), {}
    for modality, rows in statistics.rows.items():
        if modality is not Modality.TEXT and modality in factors:
            moment = statistics.second_moment[modality]
            own, text = factors[modality], factors[Modality.TEXT]
            error = PostCorrectionError(rows, moment, text, own, linears, config.damping, reads.turn)
            factors[modality], gauge = search_gauge(error)
            found[modality.name.lower()] = asdict(gauge)
    return _Input(factors, reads.folded, reads.signs, statistics), found


def _moments(group: str, reads: _Input, stages: Stages) -> dict[Modality, torch.Tensor | None]:
    """The second moment of the smoothed input that the stored weight of each modality is rounded against."""
    if not stages.rounds_against_input or group not in stages.second_moment_groups:
        return {}
    assert reads.statistics is not None
    if stages.stores_weight_per_modality:
        one_each = {m: (m,) for m in reads.factors or (Modality.TEXT,)}
    else:
        one_each = {Modality.TEXT: stages.rounding_modalities}
    pooled = {m: pooled_moment(reads.statistics, reads.factors, own) for m, own in one_each.items()}
    return {m: None if moment is None else reads.turned_moment(moment) for m, moment in pooled.items()}


def _whiteners(reads: _Input, stages: Stages) -> dict[Modality, Whitener]:
    """Square roots of C_m for the modalities to correct: one eigendecomposition for all linears of a group."""
    assert stages.compensation.kind != "none"
    assert reads.statistics is not None
    damping = stages.compensation.damping
    corrected = [m for m in reads.statistics.second_moment if m is not Modality.TEXT]
    return {modality: whitener(reads.covariance(modality), damping) for modality in corrected}


def _draft(
    linear: torch.nn.Linear,
    role: Role,
    name: str,
    reads: _Input,
    moments: Mapping[Modality, torch.Tensor | None],
    roots: Mapping[Modality, Whitener],
    stages: Stages,
) -> Draft:
    """Round one linear: for text alone, or once per modality."""
    weight, fmt = linear.weight.detach().double(), stages.scheme.formats[role]
    present = tuple(reads.factors) or (Modality.TEXT,)
    stage, config = ROUNDING.get(stages.rounding.kind), stages.rounding_of(role)
    if stages.rounds_to_remainder:
        ranks = resolve_rank(stages.compensation, *weight.shape[::-1]) if stages.compensation.kind != "none" else 0  # type: ignore[arg-type]
        rounded = {Modality.TEXT: _round_to_remainder(weight, fmt, reads, dict.fromkeys(roots, ranks), stages, role)}
    else:
        stored = present if stages.stores_weight_per_modality else (Modality.TEXT,)
        rounded = {m: stage(reads.smoothed(weight, m), fmt.weight, config, moments.get(m)) for m in stored}
    return Draft(linear, role, name, fmt, reads, rounded, roots)


def _round_to_remainder(
    weight: torch.Tensor,
    fmt: LinearFormat,
    reads: _Input,
    ranks: Mapping[Modality, int],
    stages: Stages,
    role: Role,
) -> Rounded:
    """Round one weight for all modalities, leaving to each one's correction what that is going to correct."""
    config = stages.rounding_of(role)
    assert config.kind == "gptq"
    assert reads.statistics is not None
    covariances = {m: reads.covariance(m) for m in reads.statistics.second_moment}
    smoothed = {m: reads.smoothed(weight, m) for m in {*covariances, Modality.TEXT}}
    goal = remainder(smoothed, covariances, ranks, reads.statistics.num_tokens, config.share)
    stage = ROUNDING.get(config.kind)
    if goal is None:
        return stage(smoothed[Modality.TEXT], fmt.weight, config, None)
    return stage(goal.weight, fmt.weight, config, goal.moment)


def _require_finite(tensor: torch.Tensor, name: str, what: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NumericalError(
            f"the {what} of {name} must be finite",
            value="NaN or infinity",
            remedy="check the checkpoint, or raise method.compensation.damping; finished blocks are kept",
        )

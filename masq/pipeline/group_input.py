"""What the linears of a group share: the input that they read, and its second moments.

Shapes: I input channels, O output channels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from masq.compensation.gauge import GaugedLinear, PostCorrectionError, search_gauge
from masq.compensation.low_rank import resolve_rank, scaled_covariance
from masq.models.base import GROUPS, Modality, Role
from masq.modules.centres import STORED, Centres
from masq.numerics.hadamard import random_signs, rotate
from masq.numerics.linalg import Spectrum, Whitener
from masq.rounding.inputs import InputRounding
from masq.rounding.nearest import round_nearest
from masq.rounding.stages import pooled_moment
from masq.transforms.smoothing import match_scale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from masq.calibration.statistics import GroupStatistics
    from masq.models.base import BlockAdapter
    from masq.numerics.scheme import TensorFormat
    from masq.pipeline.assembly import Stages
    from masq.transforms.stages import SmoothingPlan


@dataclass(frozen=True, eq=False)
class GroupInput:
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

    @classmethod
    def of(
        cls,
        block: BlockAdapter,
        name: str,
        group: str,
        plan: SmoothingPlan,
        statistics: Mapping[str, GroupStatistics],
        stages: Stages,
    ) -> GroupInput:
        """That of a group of the block called ``name``, with the factors of a plan."""
        factors = _scaled_factors(plan.factors.get(group, {}), stages)
        return cls(factors, group in plan.folded, _signs(block, name, group, stages), statistics.get(group))

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
        # A product of two dtypes would make one copy of the weight more.
        return self.turn(weight.to(torch.float64, copy=True).mul_(self.factor(modality, weight)))

    def centres(self, linear: torch.nn.Linear) -> Centres | None:
        """What is taken from the rows that arrive, which a folded factor has divided already; None for nothing."""
        if self.statistics is None or not self.statistics.centre:
            return None
        divided = self.factors[Modality.TEXT].double() if self.folded else 1.0
        weight, rest = linear.weight.detach().double(), 0.0 if linear.bias is None else linear.bias.detach().double()
        stored = {modality: (centre / divided).to(STORED) for modality, centre in self.statistics.centre.items()}
        biases = {modality: weight @ (centre.double() * divided) + rest for modality, centre in stored.items()}
        return Centres.of(stored, biases)

    def covariance(self, modality: Modality) -> torch.Tensor:
        """Second moment of the smoothed and rotated input, float64 [I, I]."""
        assert self.statistics is not None
        moment = self.statistics.second_moment[modality]
        return self.turned_moment(scaled_covariance(moment, self.factor(modality, moment)))

    def rounding(self, modality: Modality, fmt: TensorFormat | None) -> InputRounding:
        """What rounding to a format does to the smoothed and rotated rows of a modality that were kept."""
        assert self.statistics is not None
        rows = self.statistics.rows[modality].double()
        return InputRounding.of(self.turn(rows / self.factor(modality, rows)), fmt)

    def turned_moment(self, moment: torch.Tensor) -> torch.Tensor:
        """R^T C R, exactly symmetric."""
        if self.signs is None:
            return moment
        turned = self.turn(self.turn(moment).t())
        return (turned + turned.t()) / 2


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """Second moments of what the linears of a group read, as stages need them: shared, for they are costly.

    Attributes:
        pooled: what the stored weight of each modality is rounded against.
        single: C_m by modality, where rounding or corrections take each apart.
        roots: square roots of those to correct.
    """

    pooled: Mapping[Modality, torch.Tensor | None]
    single: Mapping[Modality, Spectrum]
    roots: Mapping[Modality, Whitener]


def second_moments(group: str, reads: GroupInput, stages: Stages) -> SecondMoments:
    """What the stages ask for in one group."""
    corrected, remainders = group in stages.compensated_groups, stages.rounds_to_remainder
    pooled = {} if remainders else _pooled(group, reads, stages)
    if not corrected and not remainders:
        return SecondMoments(pooled, {}, {})
    assert reads.statistics is not None
    wanted = [m for m in reads.statistics.second_moment if remainders or m is not stages.base]
    single = {m: Spectrum(reads.covariance(m)) for m in wanted}
    if not corrected:
        return SecondMoments(pooled, single, {})
    assert stages.compensation.kind != "none"
    damping = stages.compensation.damping
    return SecondMoments(pooled, single, {m: one.root(damping) for m, one in single.items() if m is not stages.base})


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


def gauged(
    reads: GroupInput, quantized: Sequence[tuple[Role, torch.nn.Linear]], stages: Stages
) -> tuple[GroupInput, dict[str, Any]]:
    """The input with the factor of every corrected modality chosen by the error that its correction leaves.

    Weights are rounded to nearest for the choice: how they are rounded in the end depends on it.

    Returns:
        The input, and what was chosen by modality (``Gauge``).
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
    return GroupInput(factors, reads.folded, reads.signs, statistics), found


def _pooled(group: str, reads: GroupInput, stages: Stages) -> dict[Modality, torch.Tensor | None]:
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

"""The linears of one group on their way from float to quantized: choose the factors, round, correct.

Shapes: I input channels, O output channels, R rank.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from masq.compensation.low_rank import captured_share, fit_low_rank, resolve_rank
from masq.compensation.ranks import Candidate, fill
from masq.errors import NumericalError
from masq.models.base import GROUPS, Modality, Role
from masq.modules.quant_linear import QuantLinear
from masq.numerics.finite import is_finite
from masq.numerics.low_rank import Factors, store
from masq.pipeline.group_input import GroupInput, SecondMoments, gauged, second_moments
from masq.rounding.remainder import remainder
from masq.rounding.stages import ROUNDING, Rounded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from masq.calibration.statistics import GroupStatistics
    from masq.compensation.config import NoCompensation, WhitenedLowRank
    from masq.models.base import BlockAdapter
    from masq.modules.modality import ModalityContext
    from masq.numerics.linalg import Whitener
    from masq.numerics.scheme import LinearFormat
    from masq.pipeline.assembly import Stages
    from masq.rounding.inputs import InputRounding
    from masq.transforms.stages import SmoothingPlan


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
        inputs: what rounding does to the inputs, by modality, where the stored weight takes it into account.
    """

    linear: torch.nn.Linear
    role: Role
    name: str
    fmt: LinearFormat
    reads: GroupInput
    rounded: Mapping[Modality, Rounded]
    roots: Mapping[Modality, Whitener] = field(default_factory=dict)
    inputs: Mapping[Modality, InputRounding] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[int, int]:
        """Input and output channels."""
        return self.linear.in_features, self.linear.out_features

    def residual(self, modality: Modality) -> torch.Tensor:
        """W s_m - W_hat, float64 [O, I]; W_hat as it acts on rounded inputs, if it takes them into account."""
        base = self.rounded[Modality.TEXT].weight.dequantize(torch.float64)
        if modality in self.inputs:
            base = base * self.inputs[modality].gain
        return self.reads.smoothed(self.linear.weight.detach(), modality).sub_(base)

    def layer(self, corrections: Corrections, context: ModalityContext) -> QuantLinear:
        """The quantized linear."""
        for tensor in itertools.chain.from_iterable(corrections.factors.values()):
            if tensor is not None:
                _require_finite(tensor, self.name, "correction")
        return QuantLinear(
            weights={m: one.weight for m, one in self.rounded.items()},
            bias=self.reads.centres(self.linear) or self.linear.bias,
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
    reads = GroupInput.of(block, name, group, plan, statistics, stages)
    quantized: list[tuple[Role, torch.nn.Linear]] = []
    for role in map(Role, GROUPS[group]):  # pyright: ignore[reportArgumentType]
        linear = block.linear(role)
        assert isinstance(linear, torch.nn.Linear)
        if role in stages.scheme.formats:
            _require_finite(linear.weight, f"{name}.{role}", "weight")
            quantized.append((role, linear))
        elif reads.folded:
            linear.weight.mul_(reads.factors[Modality.TEXT].to(linear.weight))
    found: dict[str, Any] = {}
    if quantized and group in stages.gauged_groups:
        reads, found = gauged(reads, quantized, stages)
    seen = second_moments(group, reads, stages)
    drafts = [_draft(linear, role, f"{name}.{role}", reads, seen, stages) for role, linear in quantized]
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
    smoothed = draft.reads.smoothed(draft.linear.weight.detach(), modality)
    energy = float((root.sqrt @ smoothed.t()).square().sum())
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return (values / energy).tolist() if energy > 0 else [0.0] * len(values)


def _draft(
    linear: torch.nn.Linear,
    role: Role,
    name: str,
    reads: GroupInput,
    seen: SecondMoments,
    stages: Stages,
) -> Draft:
    """Round one linear: for text alone, or once per modality."""
    weight, fmt = linear.weight.detach(), stages.scheme.formats[role]
    present = tuple(reads.factors) or (Modality.TEXT,)
    stage, config = ROUNDING.get(stages.rounding.kind), stages.rounding_of(role)
    inputs: Mapping[Modality, InputRounding] = {}
    if stages.rounds_to_remainder:
        if config.kind == "gptq" and config.inputs == "rounded":
            inputs = {m: reads.rounding(m, fmt.activation) for m in seen.single}
        rounded = {Modality.TEXT: _round_to_remainder(weight, fmt, reads, seen, inputs, stages, role)}
    elif stages.stores_weight_per_modality:
        rounded = {m: stage(reads.smoothed(weight, m), fmt.weight, config, seen.pooled.get(m)) for m in present}
    else:
        own = reads.smoothed(weight, stages.base)
        rounded = {Modality.TEXT: stage(own, fmt.weight, config, seen.pooled.get(Modality.TEXT))}
    return Draft(linear, role, name, fmt, reads, rounded, seen.roots, inputs)


def _round_to_remainder(
    weight: torch.Tensor,
    fmt: LinearFormat,
    reads: GroupInput,
    seen: SecondMoments,
    inputs: Mapping[Modality, InputRounding],
    stages: Stages,
    role: Role,
) -> Rounded:
    """Round one weight for all modalities, leaving to each one's correction what that is going to correct."""
    config = stages.rounding_of(role)
    assert config.kind == "gptq"
    assert reads.statistics is not None
    rank = resolve_rank(stages.compensation, *weight.shape[::-1]) if stages.compensation.kind != "none" else 0
    smoothed = {m: reads.smoothed(weight, m) for m in {*seen.single, Modality.TEXT}}
    ranks, tokens = dict.fromkeys(seen.roots, rank), reads.statistics.num_tokens
    goal = remainder(smoothed, seen.single, ranks, tokens, config.share, inputs)
    stage = ROUNDING.get(config.kind)
    if goal is None:
        return stage(smoothed[Modality.TEXT], fmt.weight, config, None)
    return stage(goal.weight, fmt.weight, config, goal.moment)


def _require_finite(tensor: torch.Tensor, name: str, what: str) -> None:
    if not is_finite(tensor):
        raise NumericalError(
            f"the {what} of {name} must be finite",
            value="NaN or infinity",
            remedy="check the checkpoint, or raise method.compensation.damping; finished blocks are kept",
        )

"""One block from float to quantized: fold, round, correct, replace."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from masq.models.base import GROUPS, Modality, Role
from masq.numerics.scheme import GROUP_ROLES, NoTowers
from masq.pipeline.linears import Corrections, draft_group, equal_ranks, filled_ranks
from masq.transforms.config import MbqSmoothing, NoSmoothing, SearchedSmoothing
from masq.transforms.frame import NoCentring, NoRotation
from masq.transforms.stages import apply_folds, moment_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from masq.calibration.statistics import GroupStatistics
    from masq.compensation.config import NoCompensation, WhitenedLowRank
    from masq.models.base import BlockAdapter
    from masq.modules.modality import ModalityContext
    from masq.numerics.scheme import Scheme, Towers
    from masq.pipeline.linears import Draft
    from masq.rounding.config import GptqRounding, NearestRounding
    from masq.transforms.config import Smoothing
    from masq.transforms.frame import Centring, Rotation
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
    centring: Centring = NoCentring()
    chain: Literal["quantized", "float"] = "quantized"
    towers: Towers = NoTowers()

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
    def centred_groups(self) -> tuple[str, ...]:
        """Groups whose inputs are centred."""
        if self.centring.kind == "none":
            return ()
        return tuple(group for group in self.centring.groups if set(GROUP_ROLES[group]) & set(self.scheme.formats))

    @property
    def compensated_groups(self) -> tuple[str, ...]:
        """Groups that get low-rank corrections, and so need second moments."""
        if self.compensation.kind == "none":
            return ()
        return tuple(group for group in self.compensation.groups if set(GROUP_ROLES[group]) & set(self.scheme.formats))

    @property
    def gauged_groups(self) -> tuple[str, ...]:
        """Groups whose factors are chosen by the error that corrections leave, and so need single tokens."""
        config = self.compensation
        searched = config.kind != "none" and config.gauge == "searched" and self.smoothing.kind != "none"
        if not searched:
            return ()
        assert self.smoothing.kind != "none"
        return tuple(group for group in self.compensated_groups if group in self.smoothing.groups)

    @property
    def groups_with_rows(self) -> tuple[str, ...]:
        """Groups of which a stage behind smoothing looks at single tokens."""
        if self.rounding.kind == "gptq" and self.rounding.inputs == "rounded":
            return self.second_moment_groups
        return self.gauged_groups

    @property
    def rounds_to_remainder(self) -> bool:
        """Whether rounding leaves to corrections what they are going to correct."""
        return self.rounding.kind == "gptq" and self.rounding.tokens == "remainder"

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
                wanted -= {self.base}
            elif self.compensation.kind == "none":
                wanted &= set(self.rounding_modalities)
        return tuple(sorted(wanted))

    @property
    def rounding_modalities(self) -> tuple[Modality, ...]:
        """Whose tokens a rounding stage looks at where one weight serves all modalities."""
        text_only = self.rounding.kind == "gptq" and self.rounding.tokens == "text"
        return (Modality.TEXT,) if text_only else tuple(Modality)

    @property
    def base(self) -> Modality:
        """The modality whose factor the one stored weight has."""
        return Modality[self.compensation.base.upper()]

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
        name: block name for errors; random signs of rotations at run time are keyed by it.
        plan: smoothing factors.
        statistics: by group, second moments and single tokens where a stage asks for them.
        stages: the method on this block.
        context: token modalities for the new linears.

    Returns:
        JSON: ``captured``, the share of the whitened weight error that corrections capture, mean over linears, by
        modality; for a stage that rounds against the input also ``rounding_gain``, the mean ratio of its error to that
        of rounding to nearest, ``rounding_fallbacks``, by role, what could not be done as configured, and
        ``rounding``, by role, that and the numbers behind it (see ``Rounded``); ``gauge``, by group and modality,
        where one was searched, and ``ranks``, by role and modality, where they differ.

    Raises:
        NumericalError: a weight, factor or correction is not finite; the message names the linear.
    """
    apply_folds(block, plan)
    note: dict[str, Any] = {"captured": {}}
    captured: dict[str, list[float]] = {}
    drafts: list[Draft] = []
    filled = stages.compensation.kind != "none" and stages.compensation.ranks == "filled"
    waiting: list[Draft] = []
    for group in GROUPS:
        made, gauges = draft_group(block, name, group, plan, statistics, stages)
        if gauges:
            note.setdefault("gauge", {})[group] = gauges
        drafts += made
        if not filled:
            # One group at a time: its square roots of second moments are the largest things here.
            _finish(block, made, equal_ranks(made, stages), stages, context, captured)
        else:
            waiting += made
    if filled:
        ranks = filled_ranks(waiting, stages)
        note["ranks"] = {one.role: {m.name.lower(): rank for m, rank in ranks[one.role].items()} for one in waiting}
        _finish(block, waiting, ranks, stages, context, captured)
    note["captured"] = {key: sum(shares) / len(shares) for key, shares in captured.items()}
    rounded = {one.role: one.rounded[Modality.TEXT] for one in drafts}
    if stages.rounds_against_input and rounded:
        note["rounding_gain"] = sum(one.gain for one in rounded.values()) / len(rounded)
        note["rounding_fallbacks"] = {role: one.fallback for role, one in rounded.items() if one.fallback}
        note["rounding"] = {role: one.to_dict() for role, one in rounded.items()}
    return note


def _finish(
    block: BlockAdapter,
    drafts: list[Draft],
    ranks: Mapping[Role, Mapping[Modality, int]],
    stages: Stages,
    context: ModalityContext,
    captured: dict[str, list[float]],
) -> None:
    """Correct what was rounded, and put it into the block."""
    for draft in drafts:
        corrections = Corrections.fit(draft, ranks[draft.role], stages.compensation)
        block.set_linear(draft.role, draft.layer(corrections, context))
        draft.release()
        for modality, share in corrections.shares.items():
            captured.setdefault(modality.name.lower(), []).append(share)

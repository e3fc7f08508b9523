"""Centring: what every token of a modality has in common is a bias, and need not be quantized.

The tokens of a modality lie around a point of their own (the modality gap), far from zero. With c_m that point,
``x W^T = (x - c_m) W^T + c_m W^T``: the last term is computed once, in float, and stored as a bias by modality.
What is rounded then is smaller: the range of a token, and with it the step of its activations, and the energy that the
error of a weight is multiplied with. Known without modalities as bias correction (arXiv 1906.04721).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from masq.calibration.statistics import GroupStatistics


def centred(statistics: Mapping[str, GroupStatistics], groups: Collection[str]) -> dict[str, GroupStatistics]:
    """Statistics by group, those of ``groups`` as if their inputs had been centred when they were collected.

    A mean |x| cannot be carried over and is dropped.
    """
    return {group: _centred(one) if group in groups else one for group, one in statistics.items()}


def _centred(one: GroupStatistics) -> GroupStatistics:
    moments = {}
    for modality, moment in one.second_moment.items():
        # E (x - c)(x - c)^T, exactly symmetric; c is a weighted mean and not E x.
        cross = torch.outer(one.centre[modality], one.mean[modality])
        moments[modality] = moment - (cross + cross.t()) + torch.outer(one.centre[modality], one.centre[modality])
    edges = {m: torch.maximum(one.high[m].double() - c, c - one.low[m].double()).float() for m, c in one.centre.items()}
    rows = {m: (rows.double() - one.centre[m]).float() for m, rows in one.rows.items()}
    return replace(one, abs_max=edges, second_moment=moments, rows=rows, abs_mean={})

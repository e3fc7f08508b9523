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

NOISE = 0.01
"""Of the energy of a centre: how much error, alike in all directions, inputs are taken to arrive with."""


def centred(
    statistics: Mapping[str, GroupStatistics],
    groups: Collection[str],
    modalities: Collection[str] = ("text", "vision", "audio"),
) -> dict[str, GroupStatistics]:
    """Statistics by group, those of ``groups`` as if their inputs had been centred when they were collected.

    A mean |x| cannot be carried over and is dropped.

    Args:
        statistics: with centres of ``groups``.
        groups: to centre.
        modalities: names of those to centre; the centre of others is the origin.
    """
    return {group: _centred(one, modalities) if group in groups else one for group, one in statistics.items()}


def _centred(given: GroupStatistics, modalities: Collection[str]) -> GroupStatistics:
    kept = {m: c if m.name.lower() in modalities else torch.zeros_like(c) for m, c in given.centre.items()}
    one = replace(given, centre=kept)
    moments = {}
    for modality, moment in one.second_moment.items():
        # E (x - c)(x - c)^T, exactly symmetric; c is a weighted mean and not E x.
        cross = torch.outer(one.centre[modality], one.mean[modality])
        centre = one.centre[modality]
        moments[modality] = moment - (cross + cross.t()) + torch.outer(centre, centre)
        # What arrives at run time carries the errors of earlier layers, of which these tokens know nothing.
        moments[modality].diagonal().add_(NOISE * centre.square().mean())
    edges = {m: torch.maximum(one.high[m].double() - c, c - one.low[m].double()).float() for m, c in one.centre.items()}
    rows = {m: (rows.double() - one.centre[m]).float() for m, rows in one.rows.items()}
    return replace(one, abs_max=edges, second_moment=moments, rows=rows, abs_mean={})

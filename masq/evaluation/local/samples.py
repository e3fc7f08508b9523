"""The samples behind a local task that a harness calls by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masq.models.base import Sample

PREFIX = "masq_"


def embedded_samples(name: str, split: str) -> list[Sample]:
    """All samples of one task in a split that comes with the embedded models.

    Args:
        name: of the task, without ``PREFIX``.
        split: ``calibration``, ``evaluation`` or ``final``.
    """
    from masq.calibration.data import load_samples
    from masq.models.zoo.smol_omni import data_path

    return load_samples(data_path(split), (name,), None, 0, ("text", "vision", "audio"))

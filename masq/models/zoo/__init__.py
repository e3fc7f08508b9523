"""Small models that ship with masq, for tests and for trying methods without a download.

Here are only their names: nothing heavy is imported.
"""

PREFIX = "zoo:"
"""What marks ``model.source`` as the name of an embedded model."""

TRAINED = ("smol_omni", "smol_vl")
"""Embedded models with trained weights and data, in the files of ``smol_omni``; the others are random."""
SPLITS = ("calibration", "evaluation", "final")
"""Splits of their data."""


def embedded_name(source: str) -> str | None:
    """Name of the embedded model that ``source`` asks for, None for a folder or a hub id."""
    return source.removeprefix(PREFIX) if source.startswith(PREFIX) else None


def is_trained(source: str) -> bool:
    """Whether ``source`` asks for an embedded model that comes with data."""
    return embedded_name(source) in TRAINED

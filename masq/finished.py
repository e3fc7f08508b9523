"""Runs that are finished: their records, and their models loaded again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from masq.config import RunConfig, active_modalities, decode
from masq.errors import DataError
from masq.report.record import RunRecord, read_record

if TYPE_CHECKING:
    from pathlib import Path

    from masq.models.base import ModelAdapter
    from masq.pipeline.assembly import Stages


def finished_record(folder: Path) -> RunRecord | None:
    """The record of a finished run in ``folder``; a failed or unreadable one is run again."""
    try:
        record = read_record(folder / "record.json")
    except DataError:
        return None
    return record if record.status == "finished" else None


def stages_of(config: RunConfig) -> Stages:
    """The method of a run that quantizes."""
    from masq.pipeline.assembly import Stages
    from masq.rounding.config import NoRounding

    method = config.method
    assert not isinstance(method.rounding, NoRounding)
    return Stages(
        method.smoothing,
        method.rounding,
        method.compensation,
        config.scheme.clipped(method.rounding.activation_clip),
        config.seed,
        method.rotation,
        method.centring,
        config.calibration.chain,
        config.towers,
    )


def load_finished(folder: Path, device: str | None = None, *, pack: bool = True) -> ModelAdapter:
    """The model of a finished run, its modality hook installed, without calibrating again.

    Args:
        folder: of the run: ``config.yaml``, ``record.json`` and the stored blocks.
        device: where to put it, None for where it was made.
        pack: hand the weights to kernels if the run did. What is only to be written needs none, and a model whose
            weights are streamed stays on disk without.

    Raises:
        DataError: no finished run there, or a block is missing or damaged.
    """
    import yaml

    from masq.models.loading import load
    from masq.modules.fused import deploy
    from masq.modules.modality import install
    from masq.pipeline.loop import restore
    from masq.pipeline.store import BlockStore

    if finished_record(folder) is None:
        raise DataError(
            "the folder must hold a finished run",
            value=folder.name,
            remedy="give the folder that masq run named: <output.root>/<model>-<modality>-<scheme>-<method>-<identity>",
        )
    config = decode(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    model = replace(config.model, modalities=active_modalities(config), device=device or config.model.device)
    adapter = load(model, folder)
    context, _ = install(adapter)
    adapter.context = context
    if not config.method.is_float:
        restore(adapter, stages_of(config), context, BlockStore(folder / "blocks"))
        if pack and config.execution != "simulated":
            deploy(adapter, config.kernel, fused=config.execution == "fused")
    if model.device.startswith("cuda") and (pack or config.method.is_float):
        adapter.decoding = config.evaluation.decoding
    return adapter

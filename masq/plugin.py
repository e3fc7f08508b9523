"""masq's runs as models of lmms-eval: ``lmms-eval --model masq --model_args path=<folder of a run> --tasks ...``.

The entry point ``lmms_eval.models`` of this package names ``manifest``; tasks of masq are found with ``--include_path``
and the folder ``masq/evaluation/local/multimodal``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmms_eval.models.registry_v2 import ModelManifest

from masq.errors import ConfigError
from masq.evaluation.multimodal import MasqLmms
from masq.finished import load_finished


class MasqRun(MasqLmms):
    """The model of a finished run, quantized or not."""

    def __init__(
        self,
        path: str | None = None,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        max_frames: int | str = 32,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        """Load it.

        Args:
            path: folder of the run.
            batch_size: requests per batch.
            device: None for where it was made.
            max_frames: of a video.
            max_batch_size: the harness passes it; batches never change.
            unknown: refused.

        Raises:
            ConfigError: no path, or an argument that is not one of these.
            DataError: no finished run there.
        """
        if path is None or unknown:
            raise ConfigError(
                "model_args of masq are path, max_frames",
                value=", ".join(sorted(unknown)) or "no path",
                remedy="lmms-eval --model masq --model_args path=<folder of a run>",
            )
        super().__init__(load_finished(Path(path), device), batch_size=int(batch_size), max_frames=int(max_frames))


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id="masq", chat_class_path=f"{MasqRun.__module__}.{MasqRun.__qualname__}")

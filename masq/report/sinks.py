"""Where a finished record goes besides its own folder: for now Weights & Biases."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Any

from masq.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from masq.report.record import RunRecord

_LOG = logging.getLogger(__name__)


def require_wandb() -> None:
    """Fail before a run starts when its configuration asks for wandb and it is not installed.

    Raises:
        ConfigError: the package is absent.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "output.wandb=true needs the wandb package", remedy="pip install 'masq[log]', or set output.wandb=false"
        )


def send_to_wandb(record: RunRecord, project: str, folder: Path) -> bool:
    """Log ``record`` as one wandb run under its identity, so that a repeated call updates instead of duplicating.

    Without credentials the run is kept offline under ``folder``, to be sent later with ``wandb sync``. The record on
    disk is the result; a sink that fails costs a warning, never the run.

    Args:
        record: a finished or failed record.
        project: wandb project.
        folder: folder of the run.

    Returns:
        Whether wandb took the record.

    Raises:
        ConfigError: the package is absent.
    """
    require_wandb()
    import wandb

    try:
        run = wandb.init(
            project=project,
            name=f"{record.method}-{record.scheme}",
            id=record.identity[:16],
            resume="allow",
            dir=str(folder),
            config=record.config,
            mode=_mode(),
        )
        run.summary.update(flat_numbers(record))
        run.finish(exit_code=0 if record.status == "finished" else 1)
    except (wandb.Error, OSError) as error:
        _LOG.warning("wandb did not take the record, it stays in %s: %s", folder, error)
        return False
    return True


def flat_numbers(record: RunRecord) -> dict[str, float]:
    """The numbers of a record under dotted names such as ``scores.digits.exact_match.value``."""
    flat: dict[str, float] = {}
    for section in ("scores", "health", "fidelity", "effective_bits", "timings"):
        _flatten(section, getattr(record, section), flat)
    flat["peak_memory_bytes"] = record.peak_memory_bytes
    return flat


def _flatten(prefix: str, value: Any, flat: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{prefix}.{key}", item, flat)
    elif isinstance(value, int | float):
        flat[prefix] = float(value)


def _mode() -> Any:
    """An explicit WANDB_MODE wins; else online only with credentials, so that nothing waits for a login."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"

"""What several runs of one output root share, in folders named by what their content depends on.

Learned smoothing factors, gradients of the loss of the float model, statistics of its activations, its outputs. A hash
of everything the content depends on is part of the folder's name, so a folder is never stale; another program that
worked on it is a warning in the record.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from masq import parallel
from masq.config import RunConfig, active_modalities
from masq.files import canonical_hash
from masq.identity import to_hashed_dict
from masq.report.sessions import add_session, differences, sessions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from masq.calibration.cache import StatisticsCache
    from masq.report.record import RunRecord


class Artifacts:
    """The shared folders of one run."""

    def __init__(self, config: RunConfig, hashes: Mapping[str, str], record: RunRecord) -> None:
        """Args: the configuration, content hashes of weights and data, and the record that warnings go to."""
        self.config, self.record = config, record
        plain = to_hashed_dict(config)
        self.method, self.scheme = plain["method"], plain["scheme"]
        self.float_model = {
            "model": {key: value for key, value in plain["model"].items() if key not in ("architecture", "source")},
            "weights": hashes["model"],
            "modalities": active_modalities(config),
            "batch_size": config.calibration.batch_size,
            "data": hashes.get("calibration"),
        }
        """What the activations of the float model on the calibration set depend on."""
        self.evaluation = hashes["evaluation"]
        self.towers = {"towers": plain["towers"]} if "towers" in plain else {}
        """Calibration sees what rounded towers give; gradients and outputs of the float model know nothing of them."""

    def note(self, what: str, folder: Path, is_complete: bool) -> None:
        """Warn if another program worked on ``folder``; note this one if it goes on. The first process does that."""
        if parallel.rank():
            return
        self.record.warnings.extend(differences(sessions(folder), self.record.provenance, what))
        if not is_complete:
            add_session(folder, self.record.provenance)

    def factors(self) -> Path:
        """Learned factors: they depend on neither rounding nor compensation, so methods share them."""
        chain = self.config.calibration.chain
        parts = {"scheme": self.scheme, "rotation": self.method["rotation"], "smoothing": self.method["smoothing"]}
        known = {"chain": chain} if chain != "quantized" else {}
        return self._folder("factors", {**self.float_model, **parts, "seed": self.config.seed, **known, **self.towers})

    def gradients(self, own: Path) -> Path:
        """Gradients of the loss of the float model, which no rotation changes; without a cache below ``own``."""
        if not self.config.calibration.cache:
            return own / "gradients"
        folder = self._folder("gradients", self.float_model)
        self.note("gradients", folder, False)
        return folder

    def statistics(self) -> StatisticsCache | None:
        """Statistics of the float chain, which a rotation does change; None without a cache."""
        from masq.calibration.cache import StatisticsCache

        if not self.config.calibration.cache:
            return None
        rotation = self.method["rotation"]
        signs = {} if rotation["kind"] == "none" else {"seed": self.config.seed}
        folder = self._folder("statistics", {**self.float_model, "rotation": rotation, **signs, **self.towers})
        self.note("statistics", folder, False)
        return StatisticsCache(folder)

    def float_outputs(self) -> Path | None:
        """Outputs of the float model on the evaluation samples; None unless they are kept."""
        if not self.config.evaluation.keep_float:
            return None
        own = {key: value for key, value in self.float_model.items() if key not in ("batch_size", "data")}
        folder = self._folder("outputs", {**own, "evaluation": self.evaluation})
        self.note("float outputs", folder, False)
        return folder

    def _folder(self, kind: str, depends_on: Mapping[str, Any]) -> Path:
        return Path(self.config.output.root) / "artifacts" / f"{kind}-{canonical_hash(depends_on)[:16]}"

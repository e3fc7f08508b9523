"""What evaluation scores. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """The evaluation set and how answers are generated (always greedily).

    Attributes:
        name: of this choice, shown under tables.
        samples_per_task: how many samples of each task are scored, None for the whole split.
        batch_size: samples per batch; batches are a fixed function of the sample order.
        max_new_tokens: longest answer.
        tasks: the tasks to score, None for all that the active modalities allow.
        benchmarks: names of ``masq.evaluation.benchmarks.BENCHMARKS`` to score instead of tasks; ``source`` is then
            what the model is compared with the float model on, where there is any.
        records: folder with the records of benchmarks as Parquet files, None for the hub.
        allow_overlap: score samples that calibration showed, and say so in the record and under every table.
        source: ``auto`` for the split that comes with an embedded model, or a Parquet file.
        split: of the data of an embedded model: ``evaluation``, or ``final``, kept for tables in which nothing is
            chosen any longer.
        fidelity_samples_per_task: samples of each task behind SQNR, NLL and KL, None for all scored ones.
        keep_float: keep what the float model makes of those samples for other runs with the same output root. Changes
            no result. Takes a number of the model's dtype for each token, block and channel; about 3 GB for
            ``smol_omni`` and 43 samples of each task.
        score: whether tasks are scored; if not, the model is only compared with the float model (SQNR, NLL, KL).
        decoding: ``graphed`` replays the steps of an answer as CUDA graphs, with a KV cache of fixed size; for models
            on an NVIDIA GPU, in float or with packed weights. ``eager`` launches kernel after kernel.
        batch_seconds: a batch of answers that takes longer is cut there; what has not ended counts as truncated, and
            the record says so. None to wait for every answer.
        max_failure_share: a task with a larger share of empty, truncated or repeating answers fails its score.
    """

    name: str = "full"
    samples_per_task: int | None = None
    batch_size: int = 20
    max_new_tokens: int = 16
    tasks: tuple[str, ...] | None = None
    benchmarks: tuple[str, ...] | None = None
    records: str | None = None
    allow_overlap: bool = False
    source: str = "auto"
    split: Literal["evaluation", "final"] = "evaluation"
    fidelity_samples_per_task: int | None = None
    keep_float: bool = False
    score: bool = True
    decoding: Literal["eager", "graphed"] = "eager"
    batch_seconds: float | None = None
    max_failure_share: float = 0.5

    def __post_init__(self) -> None:
        """Reject empty sets, and a split where there is none to choose.

        Raises:
            ConfigError: a count below 1, a share outside [0, 1], an empty list of tasks, or ``final`` of a file.
        """
        for name in ("samples_per_task", "fidelity_samples_per_task"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be positive", value=count, remedy="set null for all samples")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive", value=getattr(self, name))
        if self.batch_seconds is not None and self.batch_seconds <= 0:
            raise ConfigError(
                "batch_seconds must be positive", value=self.batch_seconds, remedy="set null for no limit"
            )
        if not 0 <= self.max_failure_share <= 1:
            raise ConfigError("max_failure_share must lie between 0 and 1", value=self.max_failure_share)
        if self.tasks is not None and not self.tasks:
            raise ConfigError("tasks must name at least one task", value="[]", remedy="set null for all tasks")
        self._check_split()
        self._check_benchmarks()

    def _check_benchmarks(self) -> None:
        if self.benchmarks is not None and (not self.benchmarks or self.tasks is not None):
            raise ConfigError(
                "benchmarks must name at least one, and take the place of tasks",
                value=f"benchmarks={list(self.benchmarks)}, tasks={self.tasks}",
                remedy="set one of them to null",
            )

    def _check_split(self) -> None:
        if self.split not in ("evaluation", "final"):
            raise ConfigError("split must be evaluation or final", value=self.split)
        if self.split == "final" and self.source != "auto":
            raise ConfigError(
                "only the data of an embedded model have a final split",
                value=f"split=final, source={self.source}",
                remedy="set source=auto, or split=evaluation and the file of the final samples as source",
            )

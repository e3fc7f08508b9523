"""What calibration looks at. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from masq.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """The calibration set.

    Attributes:
        samples_per_task: how many samples of each task are drawn, None for all there are. The eleven tasks of
            ``smol_omni`` make 132 in all; MASQuant (arXiv 2603.04800) takes 128.
        batch_size: samples per batch; batches are a fixed function of the sample order.
        seed: of the draw; keyed together with the task's name.
        tasks: the tasks to draw from, None for all that the active modalities allow.
        source: ``auto`` for the calibration split that comes with an embedded model, or a Parquet file.
    """

    samples_per_task: int | None = 12
    batch_size: int = 16
    seed: int = 0
    tasks: tuple[str, ...] | None = None
    source: str = "auto"

    def __post_init__(self) -> None:
        """Reject empty sets.

        Raises:
            ConfigError: a count below 1, a negative seed, or an empty list of tasks.
        """
        if self.samples_per_task is not None and self.samples_per_task < 1:
            raise ConfigError(
                "samples_per_task must be positive", value=self.samples_per_task, remedy="set null for all samples"
            )
        if self.batch_size < 1:
            raise ConfigError("batch_size must be positive", value=self.batch_size)
        if self.seed < 0:
            raise ConfigError("seed must not be negative", value=self.seed)
        if self.tasks is not None and not self.tasks:
            raise ConfigError("tasks must name at least one task", value="[]", remedy="set null for all tasks")

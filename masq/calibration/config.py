"""What calibration looks at. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError

Kind = Literal["text", "vision", "audio", "joint"]


@dataclass(frozen=True, slots=True)
class CalibrationConfig:
    """The calibration set.

    Attributes:
        samples_per_task: how many samples of each task are drawn, None for all there are or where ``samples`` says how
            many. The eleven tasks of ``smol_omni`` make 132 in all; MASQuant (arXiv 2603.04800) takes 128.
        samples: how many in all, instead of ``samples_per_task``: shared out among tasks as ``mix`` says.
        mix: shares of tasks with text alone, with vision, with audio and with both (``joint``), as numbers in any unit;
            a kind that is not named gets none. None gives every task the same share.
        batch_size: samples per batch; batches are a fixed function of the sample order.
        seed: of the draw; keyed together with the task's name.
        tasks: the tasks to draw from, None for all that the active modalities allow.
        source: ``auto`` for the calibration split that comes with an embedded model, the name of another of its splits
            (``evaluation`` shows what calibrating on the test set is worth), or a Parquet file.
        chain: the activations that stages look at: those of the ``quantized`` chain, so that a block sees the errors of
            the blocks before it, or of the ``float`` model, which are the same for every method and format.
        cache: keep what is found out about the float model (statistics, gradients) for other runs with the same output
            root. Changes no result. Second moments take 8 D^2 bytes for each group of linears, modality and block.
    """

    samples_per_task: int | None = 12
    samples: int | None = None
    mix: Mapping[Kind, float] | None = None
    batch_size: int = 16
    seed: int = 0
    tasks: tuple[str, ...] | None = None
    source: str = "auto"
    chain: Literal["quantized", "float"] = "quantized"
    cache: bool = True

    def __post_init__(self) -> None:
        """Reject empty sets.

        Raises:
            ConfigError: a count below 1, a negative seed, an empty list of tasks, two counts, or shares that are none.
        """
        self._check_mix()
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

    def _check_mix(self) -> None:
        if self.samples is None:
            if self.mix is not None:
                raise ConfigError(
                    "mix shares out a number of samples, which must be given",
                    value="samples=null",
                    remedy="set calibration.samples=128 calibration.samples_per_task=null",
                )
            return
        if self.samples < 1:
            raise ConfigError("samples must be positive", value=self.samples)
        if self.samples_per_task is not None:
            raise ConfigError(
                "either samples or samples_per_task may be set",
                value=f"samples={self.samples}, samples_per_task={self.samples_per_task}",
                remedy="set the other one to null",
            )
        shares = None if self.mix is None else self.mix.values()
        if shares is not None and not (all(0 <= s < float("inf") for s in shares) and any(shares)):
            raise ConfigError(
                "the shares of mix must be finite, not negative, and not all zero",
                value=dict(self.mix or {}),
                remedy="for example calibration.mix={text:1,vision:1,audio:1}",
            )

"""What masq knows of a benchmark: its task in a harness, what it needs to run, and how its scores are read.

No harness is imported here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from masq.errors import ConfigError, DataError
from masq.evaluation.logged import Columns, Logged, answer_digests
from masq.evaluation.outcomes import Outcomes, hash_samples, number_groups
from masq.files import canonical_hash
from masq.models.sample import Modality

if TYPE_CHECKING:
    from pathlib import Path

Harness = Literal["lm-eval", "lmms-eval"]
MODULES: dict[str, str] = {"lm-eval": "lm_eval", "lmms-eval": "lmms_eval"}
# Harnesses round some aggregates to five decimals.
_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Metric:
    """One number of a benchmark. In masq it is a share or ratio (perplexity: itself), however a harness scales it.

    Attributes:
        name: of this metric within the benchmark.
        label: what exactly it is, for tables.
        unit: what is printed behind it: "%", "of 1000" or nothing.
        scale: the value times this is printed, as papers do.
        higher_is_better: direction.
        columns: numerators and denominators from the logged samples; None where masq computes it beside the harness.
        key: under which the harness returns its aggregate, None where it has none.
        factor: the harness returns the value times this.
        fixed_count: the harness divides by this many samples, however many were run.
        transform: "exp" for perplexities.
        digests: of what was answered, from the logged samples.
        clusters: labels of samples that belong together, from the logged samples.
    """

    name: str
    label: str
    unit: str
    scale: float
    higher_is_better: bool = True
    columns: Callable[[Sequence[Logged]], Columns] | None = None
    key: str | None = None
    factor: float = 1.0
    fixed_count: int | None = None
    transform: Literal["identity", "exp"] = "identity"
    digests: Callable[[Sequence[Logged]], tuple[str, ...]] | None = answer_digests
    clusters: Callable[[Sequence[Logged]], list[Any]] | None = None

    def printed(self, value: float) -> float:
        """``value``, a share or ratio, as papers print it."""
        return value * self.scale

    def from_harness(self, aggregate: float, num_samples: int) -> float:
        """The harness' aggregate over ``num_samples`` samples as a share or ratio."""
        return aggregate / self.factor * (self.fixed_count / num_samples if self.fixed_count else 1.0)

    def outcomes(self, logged: Sequence[Logged]) -> Outcomes:
        """What this metric made of every logged sample, in the order of the documents.

        Args:
            logged: samples of one task as the harness logged them; at least one.

        Raises:
            ConfigError: the metric does not come from logged samples.
            DataError: no samples, or samples that cannot be counted.
        """
        if self.columns is None:
            raise ConfigError("only metrics of a harness are read from its logged samples", value=self.name)
        ordered = sorted(logged, key=lambda one: one["doc_id"])
        numerators, denominators = self.columns(ordered)
        return Outcomes(
            metric=self.name,
            higher_is_better=self.higher_is_better,
            samples=hash_samples(canonical_hash([one["doc_id"], one["doc"]]) for one in ordered),
            numerators=tuple(numerators),
            denominators=None if denominators is None else tuple(denominators),
            transform=self.transform,
            groups=None if self.clusters is None else number_groups(self.clusters(ordered)),
            answers=None if self.digests is None else self.digests(ordered),
        )


@dataclass(frozen=True)
class Rows:
    """A column of plain texts on the hub, for metrics that masq computes beside the harness.

    Attributes:
        path: of the data set.
        name: of its configuration.
        split: of it.
        column: that holds the texts.
    """

    path: str
    name: str
    split: str
    column: str


@dataclass(frozen=True)
class Benchmark:
    """One task of one harness.

    Attributes:
        name: in masq.
        harness: that has it.
        task: its name there.
        folder: of its files among the harness' tasks; indexing it alone takes no time, indexing all takes long.
        split: that is evaluated.
        metrics: the one that papers print first.
        modalities: that the model must take.
        packages: further packages that the task imports, as module and name to install.
        isolate: a task object must not be evaluated twice in one process: make it anew for every run.
        rows: texts of metrics that masq computes beside the harness.
        unparsable: which answers the harness could not read, from the logged samples; None where it reads all.
        notes: what else whoever reads the scores must know.
    """

    name: str
    harness: Harness
    task: str
    folder: str
    split: str
    metrics: tuple[Metric, ...]
    modalities: tuple[Modality, ...] = (Modality.TEXT,)
    packages: tuple[tuple[str, str], ...] = ()
    isolate: bool = False
    rows: Rows | None = None
    unparsable: Callable[[Sequence[Logged]], list[bool]] | None = None
    notes: tuple[str, ...] = field(default=())

    def check(self, modalities: Collection[Modality] | None = None) -> None:
        """Check that the benchmark can run here, before anything long begins. Nothing is imported.

        Args:
            modalities: that the model takes; None leaves this out.

        Raises:
            ConfigError: the harness or a package that the task imports is not installed, or the model lacks a modality.
        """
        for module, package in ((MODULES[self.harness], self.harness), *self.packages):
            if find_spec(module) is None:
                raise ConfigError(
                    f"benchmark {self.name} needs the package {package}",
                    value="not installed",
                    remedy=f"pip install {package}, or leave the benchmark out",
                )
        missing = set(self.modalities) - set(self.modalities if modalities is None else modalities)
        if missing:
            raise ConfigError(
                f"benchmark {self.name} needs a model that takes "
                + " and ".join(one.name.lower() for one in self.modalities),
                value=f"the model lacks {', '.join(sorted(one.name.lower() for one in missing))}",
                remedy="choose another model, or leave the benchmark out",
            )

    def arguments(self, folder: Path) -> dict[str, Any]:
        """What ``simple_evaluate`` of the harness must be told besides model, tasks and limit.

        Args:
            folder: where tasks may write what they write beside their scores; without it some write to the current
                folder.
        """
        common: dict[str, Any] = {"bootstrap_iters": 0, "log_samples": True}
        if self.harness == "lm-eval":
            return common
        told = Namespace(output_path=str(folder), process_with_media=False)
        # One after the other: threads would share the random numbers with which answers are guessed.
        return {**common, "process_docs_parallel": 1, "cli_args": told}

    def read(self, found: Mapping[str, Any]) -> dict[str, Outcomes]:
        """Outcomes of every metric that comes from the harness, held against its own aggregates.

        Args:
            found: what ``simple_evaluate`` returned.

        Raises:
            DataError: the harness' aggregate is not that of the samples that it logged.
        """
        logged = found["samples"][self.task]
        outcomes = {metric.name: metric.outcomes(logged) for metric in self.metrics if metric.columns is not None}
        for metric in self.metrics:
            if metric.key is not None:
                self._hold(metric, outcomes[metric.name], found["results"][self.task][metric.key])
        return outcomes

    def _hold(self, metric: Metric, outcomes: Outcomes, aggregate: float) -> None:
        from masq.evaluation.statistics import value

        counted, given = value(outcomes), metric.from_harness(aggregate, outcomes.n)
        if abs(counted - given) > _TOLERANCE * max(1.0, abs(counted)):
            raise DataError(
                f"{metric.key} of {self.task} must be that of its logged samples",
                value=f"{given:.6g}, its samples make {counted:.6g}",
                remedy="evaluate every task object once: some keep counts from the run before",
            )

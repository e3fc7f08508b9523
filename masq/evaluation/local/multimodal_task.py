"""masq's tasks with generated answers as tasks of lmms-eval: pictures, sounds and both."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask

from masq.errors import ConfigError
from masq.evaluation.local.samples import PREFIX, embedded_samples
from masq.evaluation.scoring import ANSWER_METRICS
from masq.evaluation.statistics import value
from masq.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from masq.models.base import Sample

MAX_NEW_TOKENS = 16
_COLUMNS = ("id", "question", "answer", "image", "audio")


class LocalTask(ConfigurableMessagesTask):
    """One of ``masq.evaluation.tasks.TASKS`` that has the model answer.

    Named in a YAML file it reads the evaluation split of the embedded models; made in Python it takes any samples.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        samples: Sequence[Sample] | None = None,
        split: str = "evaluation",
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        """Make the task.

        Args:
            config: ``task`` is its name, that of masq after ``masq_``; nothing else of it is read.
            samples: of this task, at least one; None for those of ``split`` that come with the package.
            split: what they are called.
            max_new_tokens: longest answer.

        Raises:
            ConfigError: masq has no such task, or it is scored by likelihood.
        """
        name = config["task"].removeprefix(PREFIX)
        kind = TASKS.get(name)
        if kind.mode != "generate":
            raise ConfigError(
                "only tasks with generated answers are tasks of lmms-eval", value=name, remedy="run it in lm-eval"
            )
        self._samples = list(embedded_samples(name, split) if samples is None else samples)
        metrics = [
            {
                "metric": metric,
                "aggregation": partial(_aggregate, metric),
                "higher_is_better": ANSWER_METRICS.get(metric)(["a"], ["a"]).higher_is_better,
            }
            for metric in kind.metrics
        ]
        super().__init__(
            config={
                "task": config["task"],
                "dataset_path": "masq",
                "test_split": split,
                "output_type": "generate_until",
                "doc_to_visual": _media,
                "doc_to_text": "question",
                "doc_to_target": "answer",
                "process_results": partial(_process_results, kind.metrics),
                "generation_kwargs": {"max_new_tokens": max_new_tokens, "until": [], "do_sample": False},
                "metric_list": metrics,
                "metadata": {"version": 1.0},
            }
        )

    def download(self, *_args: Any, **_kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Put the samples where the harness looks for documents: nothing is fetched."""
        columns = {name: [getattr(sample, name) for sample in self._samples] for name in _COLUMNS}
        self.dataset = DatasetDict({self.config.test_split: Dataset.from_dict(columns)})
        self.dataset_no_image = self.dataset


def _media(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The media of a sample in the order in which ``ModelAdapter.encode`` puts them."""
    return [{"type": kind, "url": {"bytes": doc[kind]}} for kind in ("image", "audio") if doc[kind] is not None]


def _process_results(metrics: Sequence[str], doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Answer and reference of one sample for every metric: scores of a corpus are not means of those of samples."""
    return dict.fromkeys(metrics, (results[0], doc["answer"]))


def _aggregate(metric: str, pairs: Sequence[tuple[str, str]]) -> float:
    answers, references = zip(*pairs, strict=True)
    return value(ANSWER_METRICS.get(metric)(answers, references))

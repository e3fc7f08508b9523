"""masq's tasks scored by likelihood as tasks of lm-eval: perplexity of passages, and multiple choice."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask

from masq.errors import ConfigError
from masq.evaluation.local.samples import PREFIX, embedded_samples
from masq.evaluation.scoring import CHOICE_METRICS, Judged, perplexity
from masq.evaluation.statistics import value
from masq.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from masq.models.base import Sample


class LocalTextTask(ConfigurableTask):
    """One of ``masq.evaluation.tasks.TASKS`` that is scored by likelihood.

    Named in a YAML file it reads the evaluation split of the embedded models and their tokenizer; made in Python it
    takes any samples. A passage is scored per token, all but the first that is not blank, which nothing precedes.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        samples: Sequence[Sample] | None = None,
        split: str = "evaluation",
        tokenizer: Any = None,
    ) -> None:
        """Make the task.

        Args:
            config: ``task`` is its name, that of masq after ``masq_``; nothing else of it is read.
            samples: of this task, at least one; None for those of ``split`` that come with the package.
            split: what they are called.
            tokenizer: of the model, None for that of the embedded models.

        Raises:
            ConfigError: masq has no such task, or the model answers it.
        """
        name = config["task"].removeprefix(PREFIX)
        kind = TASKS.get(name)
        if kind.mode == "generate":
            raise ConfigError(
                "only tasks scored by likelihood are tasks of lm-eval", value=name, remedy="run it in lmms-eval"
            )
        self._documents = _documents(
            kind.mode,
            list(embedded_samples(name, split) if samples is None else samples),
            _embedded_tokenizer() if tokenizer is None else tokenizer,
        )
        parts = _CHOICE if kind.mode == "choose" else _PASSAGE
        metrics = [
            {
                "metric": metric,
                "aggregation": partial(parts["aggregation"], metric),
                "higher_is_better": metric != "perplexity",
            }
            for metric in kind.metrics
        ]
        super().__init__(
            config={
                "task": config["task"],
                "dataset_path": "masq",
                "test_split": split,
                "process_results": partial(parts["process_results"], kind.metrics),
                "metric_list": metrics,
                "metadata": {"version": 1.0},
                **parts["config"],
            }
        )

    def download(self, *_args: Any, **_kwargs: Any) -> None:
        """Put the samples where the harness looks for documents: nothing is fetched."""
        self.dataset = DatasetDict({self.config.test_split: Dataset.from_list(self._documents)})


def _embedded_tokenizer() -> Any:
    from masq.models.zoo import smol_omni

    return smol_omni.build_tokenizer(smol_omni.language_file())


def _documents(mode: str, samples: Sequence[Sample], tokenizer: Any) -> list[dict[str, Any]]:
    if mode == "choose":
        return [
            {
                "id": sample.id,
                "question": sample.question,
                "choices": list(sample.choices),
                "right": sample.choices.index(sample.answer),
            }
            for sample in samples
        ]
    return [{"id": sample.id, **_split(sample.answer, tokenizer)} for sample in samples]


def _split(passage: str, tokenizer: Any) -> dict[str, Any]:
    """The text of the first token, the rest, and the number of tokens of the rest.

    Blank tokens at the beginning are given along with the first that is not: the harness takes blanks away from what
    precedes, and cannot go on from nothing.
    """
    encoded = tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    given = next(index for index, end in enumerate(ends) if passage[:end].strip())
    end = ends[given]
    return {"start": passage[:end], "rest": passage[end:], "num_tokens": len(ends) - given - 1}


def _process_passage(metrics: Sequence[str], doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """NLL and number of tokens: the perplexity of a corpus is not the mean of those of passages."""
    ((log_likelihood, _),) = results
    return dict.fromkeys(metrics, (-log_likelihood, doc["num_tokens"]))


def _aggregate_passages(_metric: str, items: Sequence[tuple[float, int]]) -> float:
    nll, counts = zip(*items, strict=True)
    return value(perplexity(nll, counts))


def _process_choice(metrics: Sequence[str], doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """Log-likelihoods and bytes of the choices, and the right one."""
    judged = ([value for value, _ in results], [len(choice.encode()) for choice in doc["choices"]], doc["right"])
    return dict.fromkeys(metrics, judged)


def _aggregate_choices(metric: str, items: Sequence[tuple[list[float], list[int], int]]) -> float:
    judged = [Judged(tuple(lls), tuple(sizes), right) for lls, sizes, right in items]
    return value(CHOICE_METRICS.get(metric)(judged))


_PASSAGE: dict[str, Any] = {
    "config": {"output_type": "loglikelihood", "doc_to_text": "start", "doc_to_target": "rest", "target_delimiter": ""},
    "process_results": _process_passage,
    "aggregation": _aggregate_passages,
}
_CHOICE: dict[str, Any] = {
    "config": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "target_delimiter": " ",
    },
    "process_results": _process_choice,
    "aggregation": _aggregate_choices,
}

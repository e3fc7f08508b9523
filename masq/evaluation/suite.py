"""The benchmarks of the papers on one model: each through its harness, unseen in calibration, its answers counted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masq.errors import DataError
from masq.evaluation.benchmark import Benchmark
from masq.evaluation.benchmarks import BENCHMARKS
from masq.evaluation.evaluate import EvaluationResult
from masq.evaluation.generation import Answer, health
from masq.evaluation.harness import evaluate_language, quiet
from masq.evaluation.scoring import Score
from masq.files import canonical_hash
from masq.models.conversation import Conversation
from masq.models.sample import Modality

if TYPE_CHECKING:
    from masq.evaluation.batch_store import Progress
    from masq.evaluation.config import EvaluationConfig
    from masq.models.base import ModelAdapter

_LEAKED_SHOWN = 5


def prepare_benchmarks(config: EvaluationConfig, modalities: Collection[str], shown: Collection[str]) -> list[str]:
    """Check that every benchmark can run here and that calibration showed none of it, before anything long begins.

    Args:
        config: benchmarks and where their records are.
        modalities: that the model takes.
        shown: hashes of what calibration showed (``masq.calibration.data.content_hashes``).

    Returns:
        A warning for each benchmark that calibration showed, if ``config.allow_overlap`` is on.

    Raises:
        ConfigError: an unknown benchmark, a missing package, or a modality that the model lacks.
        DataError: records that cannot be loaded, or that calibration showed.
    """
    benchmarks = [BENCHMARKS.get(name) for name in config.benchmarks or ()]
    for benchmark in benchmarks:
        benchmark.check([Modality[one.upper()] for one in modalities])
    warnings = []
    for benchmark in benchmarks:
        from masq.evaluation.benchmark_tasks import make_task

        with quiet():
            leaked = _leaked(benchmark, make_task(benchmark, _records(config)), shown)
        if leaked and not config.allow_overlap:
            raise DataError(
                "calibration and evaluation must not share samples",
                value=leaked,
                remedy="calibrate on other data, or set evaluation.allow_overlap=true and have the table say so",
            )
        warnings += [f"contaminated: calibration showed {leaked}"] if leaked else []
    return warnings


def _records(config: EvaluationConfig) -> Path | None:
    return None if config.records is None else Path(config.records)


def records_hash(config: EvaluationConfig) -> str:
    """What tells these records of benchmarks from others: SHA-256 of the files in the folder, or that it is the hub."""
    if config.records is None:
        return canonical_hash(["hub", sorted(config.benchmarks or ())])
    files = sorted(Path(config.records).rglob("*.parquet"))
    return canonical_hash(
        {str(file.relative_to(config.records)): sha256(file.read_bytes()).hexdigest() for file in files}
    )


def run_benchmarks(
    adapter: ModelAdapter, config: EvaluationConfig, folder: Path, progress: Progress
) -> EvaluationResult:
    """Score a model on ``config.benchmarks``.

    Args:
        adapter: the model; with quantized linears, the modality hook is already installed.
        config: benchmarks, where their records are, batch size, largest share of failed answers.
        folder: of this model's run: finished batches are kept there.
        progress: told after every batch.

    Returns:
        Scores, outcomes, health, warnings and versions by benchmark. Scores are shares and ratios, not percent.

    Raises:
        ConfigError: a package is missing.
        DataError: records that cannot be loaded.
    """
    result = EvaluationResult()
    for name in config.benchmarks or ():
        benchmark = BENCHMARKS.get(name)
        _run_one(result, adapter, benchmark, config, folder / "benchmarks" / name, progress)
    result.warn_of_time()
    return result


def _run_one(
    result: EvaluationResult,
    adapter: ModelAdapter,
    benchmark: Benchmark,
    config: EvaluationConfig,
    folder: Path,
    progress: Progress,
) -> None:
    from masq.evaluation.benchmark_tasks import make_task, read_rows
    from masq.evaluation.token_perplexity import token_perplexity

    with quiet():
        # A new object for every run: some tasks keep counts from the run before.
        task = make_task(benchmark, _records(config))
        evaluate = _multimodal if benchmark.harness == "lmms-eval" else _language
        found, answers, decoding = evaluate(adapter, benchmark, task, config, folder, progress)
    result.versions[benchmark.harness] = version(benchmark.harness)
    data = {split: records._fingerprint for split, records in task.dataset.items()}
    result.tasks[benchmark.name] = {"version": str(found["versions"][benchmark.task]), "data": data, **decoding}
    outcomes = benchmark.read(found)
    if benchmark.rows is not None:
        texts = read_rows(benchmark, _records(config))
        first = benchmark.metrics[0]
        outcomes[first.name] = token_perplexity(adapter, texts, folder=folder / first.name, progress=progress)
    valid = True
    if answers:
        valid = _count(result, benchmark, found, answers, config.max_failure_share)
    result.outcomes[benchmark.name] = outcomes
    result.scores[benchmark.name] = {key: Score.of(one, valid=valid) for key, one in outcomes.items()}


def _multimodal(
    adapter: ModelAdapter, benchmark: Benchmark, task: Any, config: EvaluationConfig, folder: Path, progress: Progress
) -> tuple[Any, list[Answer], dict[str, Any]]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from masq.evaluation.multimodal import MasqLmms

    model = MasqLmms(
        adapter,
        folder=folder / "answers",
        batch_size=config.batch_size,
        batch_seconds=config.batch_seconds,
        progress=progress,
    )
    found = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=config.samples_per_task,
        **benchmark.arguments(folder),
    )
    return found, model.answers[benchmark.task], model.decoding[benchmark.task]


def _language(
    adapter: ModelAdapter, benchmark: Benchmark, task: Any, config: EvaluationConfig, folder: Path, progress: Progress
) -> tuple[Any, list[Answer], dict[str, Any]]:
    from lm_eval.tasks import TaskManager

    from masq.evaluation.language import MasqLm

    found = evaluate_language(
        model=MasqLm(adapter, folder=folder / "likelihood", batch_size=config.batch_size, progress=progress),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=config.samples_per_task,
        **benchmark.arguments(folder),
    )
    return found, [], {}


def _count(
    result: EvaluationResult, benchmark: Benchmark, found: Any, answers: Sequence[Answer], max_share: float
) -> bool:
    """Add how many answers failed; whether few enough did for the score to mean what its name says."""
    counts = health(answers)
    lost = [answer.failed for answer in answers]
    if benchmark.unparsable is not None:
        logged = sorted(found["samples"][benchmark.task], key=lambda one: one["doc_id"])
        unparsable = benchmark.unparsable(logged)
        counts["unparsable"] = sum(unparsable)
        lost = [a or b for a, b in zip(lost, unparsable, strict=True)]
    counts["failed"] = sum(lost)
    result.health[benchmark.name] = dict(counts)
    if counts["failed"] <= max_share * counts["n"]:
        return True
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if kind not in ("n", "failed"))
    result.warnings.append(
        f"{benchmark.name}: {counts['failed']} of {counts['n']} answers failed ({kinds}), more than the allowed share "
        f"{max_share:g}: its scores are not valid"
    )
    return False


def _leaked(benchmark: Benchmark, task: Any, shown: Collection[str]) -> str:
    """Which documents hold a picture, a sound or a text that calibration showed; nothing if none does."""
    found = [str(number) for number, parts in enumerate(_hashes(benchmark, task)) if not parts.isdisjoint(shown)]
    more = "" if len(found) <= _LEAKED_SHOWN else f" and {len(found) - _LEAKED_SHOWN} more"
    return f"documents {', '.join(found[:_LEAKED_SHOWN])}{more} of {benchmark.name}" if found else ""


def _hashes(benchmark: Benchmark, task: Any) -> Iterable[set[str]]:
    """Content hashes of every document: of its media, or of its text where it has none."""
    documents = task.test_docs() if task.has_test_docs() else task.validation_docs()
    for number, document in enumerate(documents):
        if benchmark.harness == "lmms-eval":
            messages = task.doc_to_messages(document)
            yield Conversation.from_messages(f"{benchmark.task}/{number}", messages).content_hashes()
        else:
            target = task.doc_to_target(document)
            text = f"{task.doc_to_text(document)}{target if isinstance(target, str) else ''}"
            yield Conversation.from_messages("text", [{"role": "user", "content": text}]).content_hashes()

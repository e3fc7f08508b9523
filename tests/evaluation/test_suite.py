"""Benchmarks of the papers end to end: a model, their records, scores that say what happened; leaks come first."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from masq.calibration.data import content_hashes
from masq.errors import ConfigError, DataError
from masq.evaluation.benchmark_tasks import make_task
from masq.evaluation.benchmarks import BENCHMARKS, SUITES
from masq.evaluation.config import EvaluationConfig
from masq.evaluation.statistics import value
from masq.evaluation.suite import prepare_benchmarks, records_hash, run_benchmarks
from masq.models.base import ModelAdapter, Sample
from masq.modules.modality import install

# The harness leaves a file of its own open.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO name=.*english.json:pytest.PytestUnraisableExceptionWarning"
)
Make = Callable[..., ModelAdapter]
FIXTURES = Path(__file__).parent / "fixtures"
ALL = ("text", "vision", "audio")


def config(*names: str, **changes: Any) -> EvaluationConfig:
    return EvaluationConfig(benchmarks=names, records=str(FIXTURES), batch_size=2, max_failure_share=1.0, **changes)


def silent(_stage: str, _done: int, _total: int) -> None:
    """No progress."""


@pytest.fixture
def adapter(make_model: Make) -> ModelAdapter:
    adapter = make_model()
    install(adapter)
    return adapter


def test_scores_say_how_many_and_what_failed(adapter: ModelAdapter, tmp_path: Path) -> None:
    """nano_omni knows nothing, and says so at length."""
    names = ("omni_bench", "arc_easy")
    result = run_benchmarks(adapter, config(*names), tmp_path, silent)
    assert list(result.scores) == list(names)
    assert {name: list(by) for name, by in result.scores.items()} == {
        "omni_bench": ["acc"],
        "arc_easy": ["acc_norm", "acc"],
    }
    assert all(score.n == 2 and score.valid for by in result.scores.values() for score in by.values())
    for name in names:
        for metric, outcomes in result.outcomes[name].items():
            assert value(outcomes) == result.scores[name][metric].value
    assert set(result.health["omni_bench"]) == {"n", "empty", "truncated", "repeating", "failed", "unparsable"}
    assert "arc_easy" not in result.health, "likelihoods do not fail to be answers"
    assert set(result.versions) == {"lmms-eval", "lm-eval"}
    assert set(result.tasks["arc_easy"]) == {"version", "data"}
    assert result.tasks["omni_bench"]["max_new_tokens"] > 0
    assert result.tasks["omni_bench"]["data"].keys() == {"train"}


def test_too_many_unreadable_answers_make_a_score_invalid(adapter: ModelAdapter, tmp_path: Path) -> None:
    strict = replace(config("omni_bench"), max_failure_share=0.0)
    result = run_benchmarks(adapter, strict, tmp_path, silent)
    counts = result.health["omni_bench"]
    assert counts["failed"] > 0
    assert not result.scores["omni_bench"]["acc"].valid
    [warning] = result.warnings
    assert warning.startswith(f"omni_bench: {counts['failed']} of 2 answers failed (")
    assert f"{counts['unparsable']} unparsable" in warning


def test_a_limit_counts_what_was_run_and_ocrbench_twice_is_the_same(adapter: ModelAdapter, tmp_path: Path) -> None:
    limited = config("ocrbench", samples_per_task=1)
    scores = [run_benchmarks(adapter, limited, tmp_path / str(run), silent).scores for run in range(2)]
    assert scores[0] == scores[1]
    assert scores[0]["ocrbench"]["hits"].n == 1


def test_an_interrupted_benchmark_goes_on(adapter: ModelAdapter, tmp_path: Path) -> None:
    def killed(_stage: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    each = replace(config("scienceqa_img"), batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks(adapter, each, tmp_path / "killed", killed)
    assert len(list((tmp_path / "killed").rglob("*.json"))) == 1
    resumed = run_benchmarks(adapter, each, tmp_path / "killed", silent)
    assert resumed == run_benchmarks(adapter, each, tmp_path / "undisturbed", silent)


def picture_of_scienceqa() -> Image.Image:
    task = make_task(BENCHMARKS.get("scienceqa_img"), FIXTURES)
    return task.doc_to_visual(task.test_docs()[1])[0]


@pytest.mark.parametrize("container", ["PNG", "BMP", "TIFF"])
def test_a_picture_that_calibration_showed_is_caught_in_any_container(container: str) -> None:
    buffer = io.BytesIO()
    picture_of_scienceqa().convert("RGB").save(buffer, container)
    shown = set(content_hashes(Sample("c", "read", "Another question?", "x", image=buffer.getvalue())).values())
    with pytest.raises(DataError, match="must not share samples.*documents 1 of scienceqa_img"):
        prepare_benchmarks(config("scienceqa_img"), ALL, shown)
    [warning] = prepare_benchmarks(config("scienceqa_img", allow_overlap=True), ALL, shown)
    assert warning == "contaminated: calibration showed documents 1 of scienceqa_img"
    assert prepare_benchmarks(config("textvqa_val"), ALL, shown) == []


def test_a_sound_that_calibration_showed_is_caught() -> None:
    task = make_task(BENCHMARKS.get("librispeech_test_other"), FIXTURES)
    sound = task.doc_to_visual(task.test_docs()[0])[0].get_all_samples()
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, sound.data[0].numpy(), sound.sample_rate, format="WAV", subtype="FLOAT")
    shown = set(content_hashes(Sample("c", "speech", "What?", "x", audio=buffer.getvalue())).values())
    with pytest.raises(DataError, match="documents 0 of librispeech_test_other"):
        prepare_benchmarks(config("librispeech_test_other"), ALL, shown)


def test_what_cannot_run_is_known_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown benchmark.*Did you mean mmmu_val"):
        prepare_benchmarks(config("mmmu_va"), ALL, ())
    with pytest.raises(ConfigError, match="the model lacks audio"):
        prepare_benchmarks(config("omni_bench"), ("text", "vision"), ())
    with pytest.raises(DataError, match="records of arc_easy must be in"):
        prepare_benchmarks(replace(config("arc_easy"), records=str(tmp_path)), ALL, ())
    with pytest.raises(ConfigError, match="take the place of tasks"):
        EvaluationConfig(benchmarks=("arc_easy",), tasks=("read",))


def test_other_records_are_another_evaluation(tmp_path: Path) -> None:
    first = records_hash(config("arc_easy"))
    (tmp_path / "arc_easy.parquet").write_bytes(b"other")
    assert records_hash(replace(config("arc_easy"), records=str(tmp_path))) != first
    assert records_hash(replace(config("arc_easy"), records=None)) != first


def test_the_suites_of_the_configurations_are_those_of_the_papers() -> None:
    import yaml

    folder = Path(__file__).parents[2] / "conf" / "evaluation"
    for name, benchmarks in SUITES.items():
        told = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert (told["name"], tuple(told["benchmarks"])) == (name, benchmarks)
        assert all(one in BENCHMARKS.names() for one in benchmarks)

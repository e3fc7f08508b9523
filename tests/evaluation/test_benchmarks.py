"""Every benchmark of the paper goes offline through its own, unmodified harness task, on two invented records."""

from __future__ import annotations

import io
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmms_eval.evaluator
import numpy as np
import pytest
import soundfile
import torch
from datasets import DatasetDict
from lm_eval.api.model import LM
from lmms_eval.api.task import ConfigurableMessagesTask

from masq.errors import ConfigError, DataError
from masq.evaluation.benchmark import Benchmark
from masq.evaluation.benchmark_tasks import RATE, Recording, make_task, read_records, read_rows, task_manager
from masq.evaluation.benchmarks import BENCHMARKS, SUITES
from masq.evaluation.harness import evaluate_language
from masq.evaluation.language import MasqLm
from masq.evaluation.multimodal import MasqLmms
from masq.evaluation.statistics import value
from masq.evaluation.token_perplexity import token_perplexity
from masq.models.base import Modality, ModelAdapter
from masq.models.conversation import kind_of
from masq.models.qwen2_5_omni import Qwen25OmniAdapter
from masq.models.zoo import nano
from masq.modules.modality import install
from tests.evaluation import make_fixtures
from tests.evaluation.make_fixtures import FOLDER

# lmms-eval's English normaliser leaves a file open when it is made.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO name=.*english.json:pytest.PytestUnraisableExceptionWarning"
)

MULTIMODAL = [name for name in BENCHMARKS.names() if BENCHMARKS.get(name).harness == "lmms-eval"]
LANGUAGE = [name for name in BENCHMARKS.names() if BENCHMARKS.get(name).harness == "lm-eval"]

# What a model might say to the two records, and the values of the metrics that follow, counted by hand.
RIGHT: dict[str, tuple[str, str]] = {
    "mmmu_val": ("A", "The number is 27."),
    "ocrbench": ("It says Mask.", "x^{2}"),
    "vizwiz_vqa_val": ("Tea", "unanswerable"),
    "scienceqa_img": ("B", "A. up"),
    "textvqa_val": ("9", "the bus"),
    "librispeech_test_other": ("Mr. Fox doesn't sing.", "a quiet tone for 21 days"),
    "wenet_speech_test_net": ("今天有20个声音。", "你好，世界！"),
    "omni_bench": ("C", "(A) a bell"),
}
WRONG: dict[str, tuple[str, str]] = {
    "mmmu_val": ("B", "The number is 28."),
    "ocrbench": ("It says nothing.", "x^{3}"),
    "vizwiz_vqa_val": ("coffee", "hello"),
    "scienceqa_img": ("A", "the answer is A"),
    "textvqa_val": ("8", "train"),
    "librispeech_test_other": ("", "bell"),
    "wenet_speech_test_net": ("", "再见明月风"),
    "omni_bench": ("A", "no idea"),
}
PARTLY: dict[str, tuple[str, str]] = RIGHT | {
    "mmmu_val": ("A", "28"),
    "ocrbench": ("MASK", "x^{3}"),
    "vizwiz_vqa_val": ("a box", "unanswerable"),
    "scienceqa_img": ("B", "left"),
    "textvqa_val": ("bus 9", "bus"),
    "librispeech_test_other": ("Mr. Fox does sing", "a tone for 21 long days"),
    "wenet_speech_test_net": ("今天有二十声音", "你好世界"),
    "omni_bench": ("C", "(B)"),
}
# Ten people wrote an answer of 2 or 1 of them: min(1, others who wrote it / 3), averaged over whom is left out.
TWO_OF_TEN = (8 * 2 / 3 + 2 * 1 / 3) / 10
ONE_OF_TEN = (9 * 1 / 3 + 1 * 0) / 10
VALUES: dict[str, dict[str, dict[str, float]]] = {
    "right": {
        **{name: {"acc": 1.0} for name in ("mmmu_val", "scienceqa_img", "omni_bench")},
        **{name: {"soft_accuracy": 1.0} for name in ("vizwiz_vqa_val", "textvqa_val")},
        "ocrbench": {"hits": 1.0},
        "librispeech_test_other": {"wer": 0.0},
        # The harness drops digits, and with them two of eight characters of the first utterance.
        "wenet_speech_test_net": {"cer": 0.0, "mer": 0.125},
    },
    "wrong": {
        **{name: {"acc": 0.0} for name in ("mmmu_val", "scienceqa_img", "omni_bench")},
        **{name: {"soft_accuracy": 0.0} for name in ("vizwiz_vqa_val", "textvqa_val")},
        "ocrbench": {"hits": 0.0},
        "librispeech_test_other": {"wer": 1.0},
        # All 8 and all 4 characters, and one too many.
        "wenet_speech_test_net": {"cer": 13 / 12, "mer": 1.0},
    },
    "partly": {
        **{name: {"acc": 0.5} for name in ("mmmu_val", "scienceqa_img", "omni_bench")},
        "ocrbench": {"hits": 0.5},
        "vizwiz_vqa_val": {"soft_accuracy": (TWO_OF_TEN + 1) / 2},
        "textvqa_val": {"soft_accuracy": (ONE_OF_TEN + 1) / 2},
        # "mister fox does not sing" lacks a word; of "a quiet tone for 21 days" one is gone and one added.
        "librispeech_test_other": {"wer": 3 / 11},
        "wenet_speech_test_net": {"cer": 1 / 12, "mer": 1 / 16},
    },
}
MEDIA: dict[str, list[list[str]]] = {
    "mmmu_val": [["image", "text", "image", "text"], ["text", "image", "text"]],
    **{name: [["image", "text"]] * 2 for name in ("ocrbench", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val")},
    **{name: [["audio", "text"]] * 2 for name in ("librispeech_test_other", "wenet_speech_test_net")},
    "omni_bench": [["audio", "image", "text"]] * 2,
}


class Scripted:
    """Says what it is told to, and notes what it was shown."""

    end_ids = (256,)

    def __init__(self, answers: Mapping[str, Sequence[str]]) -> None:
        self.answers = answers
        self.model = SimpleNamespace(device="cpu")
        self.shown: dict[str, list[Any]] = {}

    def encode_conversations(self, conversations: Sequence[Any]) -> list[str]:
        said = []
        for one in conversations:
            task, _split, document, _hash = one.id.split("/")
            self.shown.setdefault(task, []).append(one)
            said.append(self.answers[task][int(document)])
        return said

    def generate(self, said: Sequence[str], *_limits: Any) -> list[list[int]]:
        return [[*text.encode(), 256] for text in said]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(one for one in ids if one < 256).decode()


class Choosing(LM):
    """Likes texts that end in what it is told to like; a word costs it one nat."""

    def __init__(self, liked: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.liked = liked

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        found = []
        for one in requests:
            endings = tuple(self.liked[one.task_name])
            # WinoGrande's options are in the context, the other tasks' after it.
            likes = any(text.strip().endswith(endings) for text in one.args)
            found.append((-1.0 if likes else -1000.0, likes))
        return found

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        return [-float(len(one.args[0].split())) for one in requests]

    def generate_until(self, requests: Any) -> list[str]:
        raise NotImplementedError


@dataclass
class Run:
    """What a harness found for all benchmarks at once, what the model was shown, and where the run wrote."""

    found: dict[str, Any]
    shown: dict[str, list[Any]]
    folder: Path


def benchmark(name: str) -> Benchmark:
    return BENCHMARKS.get(name)


def run_multimodal(adapter: Any, names: Sequence[str], folder: Path, **more: Any) -> dict[str, Any]:
    tasks: list[Any] = [make_task(benchmark(name), FOLDER) for name in names]
    model = MasqLmms(adapter, folder=folder / "answers", batch_size=2)
    settings = benchmark(names[0]).arguments(folder)
    manager = task_manager(benchmark(names[0]))
    found = lmms_eval.evaluator.simple_evaluate(model=model, tasks=tasks, task_manager=manager, **settings, **more)
    assert found is not None
    return found


def run_language(model: LM, names: Sequence[str], folder: Path) -> dict[str, Any]:
    tasks: list[Any] = [make_task(benchmark(name), FOLDER) for name in names]
    settings = benchmark(names[0]).arguments(folder)
    manager = task_manager(benchmark(names[0]))
    found = evaluate_language(model=model, tasks=tasks, task_manager=manager, **settings)
    assert found is not None
    return dict(found)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder of its own, in which nothing may be left."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("elsewhere")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def scripted(elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All multimodal benchmarks answered right, wrong, and partly right."""
    runs = {}
    for kind, answers in (("right", RIGHT), ("wrong", WRONG), ("partly", PARTLY)):
        folder, adapter = tmp_path_factory.mktemp(kind), Scripted(answers)
        runs[kind] = Run(run_multimodal(adapter, MULTIMODAL, folder), adapter.shown, folder)
    return runs


@pytest.fixture(scope="module")
def omni() -> ModelAdapter:
    adapter = Qwen25OmniAdapter(*nano.build("nano_omni"))
    install(adapter)
    return adapter


@pytest.mark.parametrize("name", BENCHMARKS.names())
def test_the_harness_has_the_task_the_metrics_and_the_split(name: str) -> None:
    one = benchmark(name)
    manager = task_manager(one)
    assert one.task in manager.all_subtasks
    config = make_task(one, FOLDER).config
    harness_metrics = {entry["metric"]: entry for entry in config.metric_list}
    for metric in one.metrics:
        if metric.key is not None:
            entry = harness_metrics[metric.key.removesuffix(",none")]
            assert entry.get("higher_is_better", metric.higher_is_better) == metric.higher_is_better
    if one.harness == "lmms-eval":
        assert config.test_split == one.split
    else:
        text = Path(manager.task_index[one.task].yaml_path).read_text()
        splits = dict(re.findall(r"^(validation|test)_split: (\w+)$", text, re.MULTILINE))
        assert one.split == (splits["test"] if splits.get("test", "null") != "null" else splits["validation"])


@pytest.mark.slow
def test_names_are_in_the_whole_index() -> None:
    from lm_eval.tasks import TaskManager as LanguageTaskManager
    from lmms_eval.tasks import TaskManager

    for names, manager in ((MULTIMODAL, TaskManager()), (LANGUAGE, LanguageTaskManager())):
        assert {benchmark(name).task for name in names} <= set(manager.all_subtasks)


@pytest.mark.parametrize("name", sorted(make_fixtures.RECORDS))
def test_fixtures_are_what_the_script_writes(name: str) -> None:
    """Encoded media aside, which depend on the versions of their libraries."""
    columns, rows = make_fixtures.RECORDS[name]()
    written = read_records(FOLDER, name)
    assert written.features == columns
    media = [key for key, kind in columns.items() if type(kind).__name__ in ("Image", "Audio")]
    expected = [{key: row.get(key) for key in columns if key not in media} for row in rows]
    assert written.remove_columns(media).to_list() == expected
    assert (FOLDER / f"{name}.parquet").stat().st_size < 20_000


@pytest.mark.parametrize("name", MULTIMODAL)
@pytest.mark.parametrize("kind", ["right", "wrong", "partly"])
def test_scores_are_those_counted_by_hand(scripted: dict[str, Run], kind: str, name: str) -> None:
    one, found = benchmark(name), scripted[kind].found
    expected = VALUES[kind][name]
    outcomes = one.read(found)
    assert {key: value(found) for key, found in outcomes.items()} == pytest.approx(expected, abs=1e-9)
    for metric in one.metrics:
        if metric.key is not None:
            aggregate = found["results"][one.task][metric.key]
            assert metric.from_harness(aggregate, 2) == pytest.approx(expected[metric.name], abs=2e-5)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_every_medium_reaches_the_model(scripted: dict[str, Run], name: str) -> None:
    conversations = scripted["right"].shown[name]
    assert [[kind_of(part) for part in one.parts] for one in conversations] == MEDIA[name]
    assert {modality for one in conversations for modality in one.modalities} == set(benchmark(name).modalities)


def test_sounds_arrive_whole_at_the_models_rate(scripted: dict[str, Run]) -> None:
    """lmms-eval would call 24 kHz of WenetSpeech 16 kHz if librosa is missing."""
    for name in ("wenet_speech_test_net", "librispeech_test_other"):
        sounds = [one.parts[0] for one in scripted["right"].shown[name]]
        assert [(sound.rate, len(sound.waveform)) for sound in sounds] == [(RATE, 2400), (RATE, 1600)]
        spectrum = np.abs(np.fft.rfft(sounds[0].waveform))
        assert spectrum.argmax() * RATE / 2400 == pytest.approx(330, abs=7)


def test_outcomes_pair_and_tell_what_was_answered(scripted: dict[str, Run]) -> None:
    for name in MULTIMODAL:
        right, wrong = (benchmark(name).read(scripted[kind].found) for kind in ("right", "wrong"))
        for key, outcomes in right.items():
            assert outcomes.samples == wrong[key].samples
            assert outcomes.answers is not None
            assert outcomes.answers != wrong[key].answers
    assert benchmark("textvqa_val").read(scripted["right"].found)["soft_accuracy"].groups == (0, 0)
    wer = benchmark("librispeech_test_other").read(scripted["partly"].found)["wer"]
    assert (wer.numerators, wer.counts) == ((1.0, 2.0), (5.0, 6.0))


def test_nothing_is_written_to_the_current_folder(scripted: dict[str, Run], elsewhere: Path) -> None:
    assert list(elsewhere.iterdir()) == []
    written = {path.name for path in scripted["right"].folder.iterdir()}
    assert {"answers", "results", "submissions"} <= written


def test_guesses_of_the_harness_are_counted(tmp_path: Path, elsewhere: Path) -> None:
    answers = {"mmmu_val": ("hm", "27"), "omni_bench": ("hm", "A")}
    found = run_multimodal(Scripted(answers), list(answers), tmp_path)
    for name, one in ((name, benchmark(name)) for name in answers):
        state = random.getstate()
        assert one.unparsable is not None
        assert one.unparsable(found["samples"][name]) == [True, False]
        assert random.getstate() == state
    (guess,) = found["samples"]["mmmu_val"][0]["mmmu_acc"]["parsed_pred"]
    assert guess in "ABC"
    again = run_multimodal(Scripted(answers), list(answers), tmp_path / "again")
    assert again["samples"]["mmmu_val"][0]["mmmu_acc"]["parsed_pred"] == [guess], "guessed in a fixed order"


def test_what_the_prompt_of_mmmu_loses() -> None:
    """Noted with the benchmark: the harness is not patched, and every method is asked the same."""
    task = make_task(benchmark("mmmu_val"), FOLDER)
    doc = dict(task.eval_docs[1]) | {"image_2": task.eval_docs[0]["image_2"]}

    def told(question: str) -> list[Any]:
        (message,) = task.doc_to_messages(doc | {"question": question})
        return [part.get("text", part.get("url")) for part in message["content"]]

    first, *rest = told("Compare <image 1> with a frame, then turn <image 1> by half.")
    assert (first, len(rest)) == ("Compare", 2)
    assert rest[1].startswith("by half."), "nobody said what to compare it with"
    pixels = [part.tobytes() for part in told("First <image 2>, then <image 1>") if not isinstance(part, str)]
    assert pixels == [doc[f"image_{number}"].convert("RGB").tobytes() for number in (1, 2)]
    assert len(benchmark("mmmu_val").notes) == 2


def test_a_task_object_of_ocrbench_keeps_hits_of_the_run_before(tmp_path: Path, elsewhere: Path) -> None:
    one = benchmark("ocrbench")
    assert one.isolate

    def aggregate(task: Any, folder: Path) -> dict[str, Any]:
        model: Any = MasqLmms(Scripted(RIGHT), folder=folder / "answers")  # type: ignore[arg-type]
        found = lmms_eval.evaluator.simple_evaluate(
            model=model, tasks=[task], task_manager=task_manager(one), **one.arguments(folder)
        )
        assert found is not None
        return found

    def hits(found: dict[str, Any]) -> float:
        return found["results"]["ocrbench"]["ocrbench_accuracy,none"] * 1000

    task = make_task(one, FOLDER)
    first, second = (aggregate(task, tmp_path / str(run)) for run in range(2))
    assert (hits(first), hits(second)) == (2.0, 4.0), "two records, whose hits are counted again"
    assert value(one.read(first)["hits"]) == 1.0
    with pytest.raises(DataError, match="Evaluate every task object once"):
        one.read(second)
    assert hits(aggregate(make_task(one, FOLDER), tmp_path / "new")) == 2.0, "a new object begins at 0"


def test_a_model_goes_through_all_multimodal_benchmarks(omni: ModelAdapter, tmp_path: Path, elsewhere: Path) -> None:
    seen: dict[int, set[int]] = {}
    generate = omni.generate

    def watch(batch: Any, *limits: Any) -> list[list[int]]:
        seen[len(seen)] = set(batch.modality.unique().tolist())
        return generate(batch, *limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omni, "generate", watch)
        found = run_multimodal(omni, MULTIMODAL, tmp_path, gen_kwargs="max_new_tokens=2")
    for name, modalities in zip(MULTIMODAL, seen.values(), strict=True):
        assert modalities - {int(Modality.PADDING)} == set(map(int, benchmark(name).modalities)), name
        assert benchmark(name).read(found)


LIKED = {
    "hellaswag": ("draws a frame.", "fills the room."),
    "winogrande": ("into the box because the pen", "hold the pen because the box"),
    "arc_easy": ("a flute", "a sheet"),
}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """All language benchmarks by a model that likes all right answers, and by one that likes those of first records."""
    folder = tmp_path_factory.mktemp("chosen")
    first = {name: endings[:1] for name, endings in LIKED.items()}
    return run_language(Choosing(LIKED), LANGUAGE, folder), run_language(Choosing(first), LANGUAGE, folder)


@pytest.mark.parametrize("name", sorted(LIKED))
def test_choices_are_scored_as_counted_by_hand(chosen: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    one = benchmark(name)
    right, half = (one.read(found) for found in chosen)
    assert {key: value(outcomes) for key, outcomes in right.items()} == {metric.name: 1.0 for metric in one.metrics}
    assert {outcomes.numerators[0] for outcomes in half.values()} == {1.0}
    assert right["acc"].samples == half["acc"].samples
    before, after = right["acc"].answers, half["acc"].answers
    assert before is not None and after is not None
    assert before[0] == after[0]
    assert (before[1] != after[1]) == (half["acc"].numerators[1] == 0)


def test_perplexity_per_word_counts_the_words_of_the_original(chosen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    outcomes = benchmark("wikitext").read(chosen[0])["word_perplexity"]
    pages = [row["page"] for row in make_fixtures.wikitext()[1]]
    assert outcomes.counts == tuple(len(re.split(r"\s+", page)) for page in pages)
    # Detokenized, a full stop belongs to the word before it, and "1 @,@ 000 ." is one word.
    assert outcomes.numerators == (14.0, 13.0)
    assert value(outcomes) == pytest.approx(math.exp(sum(outcomes.numerators) / sum(outcomes.counts)))


def test_a_model_goes_through_all_language_benchmarks(omni: ModelAdapter, tmp_path: Path) -> None:
    found = run_language(MasqLm(omni, folder=tmp_path, batch_size=4), LANGUAGE, tmp_path)
    for name in LANGUAGE:
        for outcomes in benchmark(name).read(found).values():
            assert outcomes.n == 2
            assert math.isfinite(value(outcomes))


def test_suites_and_printing() -> None:
    assert {name for names in SUITES.values() for name in names} == set(BENCHMARKS.names())
    assert benchmark("ocrbench").metrics[0].printed(0.5) == 500
    assert benchmark("librispeech_test_other").metrics[0].printed(0.034) == pytest.approx(3.4)
    tokens, words = benchmark("wikitext").metrics
    assert (tokens.key, words.key) == (None, "word_perplexity,none")
    assert tokens.label != words.label
    with pytest.raises(ConfigError, match="read from its logged samples"):
        tokens.outcomes([])
    with pytest.raises(ConfigError, match="Did you mean mmmu_val"):
        BENCHMARKS.get("mmmu")


def test_what_is_missing_is_said_before_anything_runs() -> None:
    for name in BENCHMARKS.names():
        benchmark(name).check()
    one = replace(benchmark("librispeech_test_other"), packages=(("not_a_module", "not-a-package"),))
    with pytest.raises(ConfigError, match="Pip install not-a-package"):
        one.check()
    with pytest.raises(ConfigError, match="lacks audio"):
        benchmark("omni_bench").check((Modality.TEXT, Modality.VISION))


def test_data_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"must be in ocrbench.parquet or ocrbench/\*.parquet"):
        make_task(benchmark("ocrbench"), tmp_path)
    (tmp_path / "ocrbench.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="the data of ocrbench must be there"):
        make_task(benchmark("ocrbench"), tmp_path)

    def unreachable(*_args: Any, **_kwargs: Any) -> Any:
        raise ConnectionError("no route to the hub")

    use_hub(monkeypatch, unreachable)
    for name in ("ocrbench", "hellaswag"):
        with pytest.raises(DataError, match=f"the data of {name} must be there .*no route to the hub"):
            make_task(benchmark(name))
    with pytest.raises(DataError, match="the data of wikitext must be there"):
        read_rows(benchmark("wikitext"))


def test_data_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def fetch(*_args: Any, **kwargs: Any) -> DatasetDict:
        told.append(kwargs)
        splits = ("train", "validation", "test", one.split)
        return DatasetDict({split: read_records(FOLDER, one.name) for split in splits})

    use_hub(monkeypatch, fetch)
    for one in (benchmark("omni_bench"), benchmark("librispeech_test_other"), benchmark("hellaswag")):
        task = make_task(one)
        assert len(task.eval_docs) == 2
        assert one.harness == "lm-eval" or isinstance(task.eval_docs[0]["audio"], Recording)
    assert all("token" not in kwargs for kwargs in told), "data that are open to all need no login"


def use_hub(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    """Have ``load`` answer instead of the hub, and lose no time between attempts."""
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("masq.evaluation.benchmark_tasks.load_dataset", load)
    retry: Any = ConfigurableMessagesTask.download.retry  # type: ignore[attr-defined]
    monkeypatch.setattr(retry, "sleep", lambda _seconds: None)


def test_several_files_make_one_benchmark(tmp_path: Path) -> None:
    folder = tmp_path / "winogrande"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.parquet").write_bytes((FOLDER / "winogrande.parquet").read_bytes())
    assert len(read_records(tmp_path, "winogrande")) == 4


def test_a_recording_is_a_dictionary_and_a_decoder() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((4800, 2)), 48000, format="WAV")
    recording = Recording({"bytes": buffer.getvalue(), "path": None}, "drawn")
    assert recording == {"type": "audio"}
    decoded = recording.get_all_samples()
    assert (decoded.sample_rate, tuple(decoded.data.shape), decoded.data.dtype) == (RATE, (1, 1600), torch.float32)
    with pytest.raises(DataError, match="sample drawn"):
        Recording({"bytes": b"noise", "path": None}, "drawn").get_all_samples()


def test_token_perplexity_of_the_raw_rows(omni: ModelAdapter) -> None:
    rows = read_rows(benchmark("wikitext"), FOLDER)
    assert rows[0] == ""
    found = token_perplexity(omni, rows, length=16)
    assert found.n == len("\n\n".join(rows)) // 16

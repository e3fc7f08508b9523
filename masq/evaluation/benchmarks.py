"""The benchmarks of the papers and the suites that papers make of them.

Names and keys are those of lm-eval 0.4.13 and lmms-eval 0.7.3. A new benchmark is one entry here; its task objects are
made by ``masq.evaluation.benchmark_tasks``. No harness is imported here.
"""

from __future__ import annotations

from typing import Any

from masq.evaluation import logged as read
from masq.evaluation.benchmark import Benchmark as Benchmark
from masq.evaluation.benchmark import Metric as Metric
from masq.evaluation.benchmark import Rows
from masq.models.sample import Modality
from masq.registry import Registry

_VISION = (Modality.TEXT, Modality.VISION)
_AUDIO = (Modality.TEXT, Modality.AUDIO)
_ALL = (Modality.TEXT, Modality.VISION, Modality.AUDIO)
_EDIT_DISTANCE = ("editdistance", "editdistance")


def _accuracy(name: str, label: str, key: str, columns: Any, **changes: Any) -> Metric:
    settings: dict[str, Any] = {"unit": "%", "scale": 100.0, **changes}
    return Metric(name=name, label=label, key=key, columns=columns, **settings)


def _choices(name: str, folder: str, split: str, *, normalised: bool) -> Benchmark:
    """A task of lm-eval with choices. Per character first where papers print that, and lm-eval has it."""
    plain = _accuracy("acc", "accuracy", "acc,none", read.share("acc"), digests=read.choice_digests)
    per_character = _accuracy(
        "acc_norm", "accuracy by likelihood per character", "acc_norm,none", read.share("acc_norm"), digests=None
    )
    return Benchmark(name, "lm-eval", name, folder, split, (per_character, plain) if normalised else (plain,))


_WER = {"unit": "%", "scale": 100.0, "higher_is_better": False}

BENCHMARKS: Registry[Benchmark] = Registry("benchmark")

for _one in (
    Benchmark(
        "mmmu_val",
        "lmms-eval",
        "mmmu_val",
        "mmmu",
        "validation",
        (_accuracy("acc", "accuracy", "mmmu_acc,none", read.mmmu_hits),),
        _VISION,
        unparsable=read.mmmu_unparsable,
        notes=(
            "for a multiple-choice answer without a choice the harness draws one at random, in order of documents",
            "where a question names a picture twice the harness drops the text in between, and pictures that are not "
            "named in their order change places",
        ),
    ),
    Benchmark(
        "ocrbench",
        "lmms-eval",
        "ocrbench",
        "ocrbench",
        "test",
        (
            _accuracy(
                "hits",
                "answers that contain a reference",
                "ocrbench_accuracy,none",
                read.ocrbench_hits,
                unit="of 1000",
                scale=1000.0,
                fixed_count=1000,
            ),
        ),
        _VISION,
        isolate=True,
        notes=("the harness divides by 1000 whatever the limit; masq by the samples that were run",),
    ),
    Benchmark(
        "vizwiz_vqa_val",
        "lmms-eval",
        "vizwiz_vqa_val",
        "vizwiz_vqa",
        "val",
        (_accuracy("soft_accuracy", "VQA accuracy", "exact_match,none", read.share("exact_match")),),
        _VISION,
    ),
    Benchmark(
        "scienceqa_img",
        "lmms-eval",
        "scienceqa_img",
        "scienceqa",
        "test",
        (_accuracy("acc", "accuracy, questions with a picture", "exact_match,none", read.share("exact_match")),),
        _VISION,
        notes=("questions with a picture alone; the task scienceqa is the full test set",),
    ),
    Benchmark(
        "textvqa_val",
        "lmms-eval",
        "textvqa_val",
        "textvqa",
        "validation",
        (
            _accuracy(
                "soft_accuracy",
                "VQA accuracy",
                "exact_match,none",
                read.share("exact_match"),
                clusters=read.pictures("image_id"),
            ),
        ),
        _VISION,
    ),
    Benchmark(
        "librispeech_test_other",
        "lmms-eval",
        "librispeech_test_other",
        "librispeech",
        "librispeech_test_other",
        (Metric("wer", "word error rate", columns=read.librispeech_errors, key="wer,none", factor=100.0, **_WER),),
        _AUDIO,
        packages=(_EDIT_DISTANCE,),
    ),
    Benchmark(
        "wenet_speech_test_net",
        "lmms-eval",
        "wenet_speech_test_net",
        "wenet_speech",
        "test_net",
        (
            Metric("cer", "character error rate of the corpus", columns=read.wenetspeech_errors, **_WER),
            Metric(
                "mer",
                "mean over utterances of a mixed error rate capped at 100 %",
                columns=read.share("mer", 100.0),
                key="mer,none",
                factor=100.0,
                **_WER,
            ),
        ),
        _AUDIO,
        packages=(_EDIT_DISTANCE,),
        notes=("papers print the character error rate of the corpus, which the harness does not have",),
    ),
    Benchmark(
        "omni_bench",
        "lmms-eval",
        "omni_bench",
        "omni_bench",
        "train",
        (_accuracy("acc", "accuracy", "accuracy,none", read.omnibench_hits, factor=100.0),),
        _ALL,
        unparsable=read.omnibench_unparsable,
    ),
    Benchmark(
        "wikitext",
        "lm-eval",
        "wikitext",
        "wikitext",
        "test",
        (
            Metric(
                "token_perplexity_2048",
                "perplexity per token, windows of 2048",
                "",
                1.0,
                higher_is_better=False,
                transform="exp",
                digests=None,
            ),
            Metric(
                "word_perplexity",
                "perplexity per word, detokenized documents",
                "",
                1.0,
                higher_is_better=False,
                columns=read.word_likelihoods,
                key="word_perplexity,none",
                transform="exp",
                digests=None,
            ),
        ),
        rows=Rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
        notes=("papers on quantization print the perplexity per token, which the harness does not have",),
    ),
    _choices("hellaswag", "hellaswag", "validation", normalised=True),
    _choices("winogrande", "winogrande", "validation", normalised=False),
    _choices("arc_easy", "arc", "test", normalised=True),
):
    BENCHMARKS.register(_one.name, _one)

SUITES: dict[str, tuple[str, ...]] = {
    "paper_vl": ("mmmu_val", "ocrbench", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val"),
    "paper_omni": ("librispeech_test_other", "wenet_speech_test_net", "mmmu_val", "omni_bench"),
    "paper_text": ("wikitext", "hellaswag", "winogrande", "arc_easy"),
}
"""Names in ``BENCHMARKS`` by suite: vision, omni and text tables of the paper."""

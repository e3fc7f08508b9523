"""Models and samples of the evaluation tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from masq.models.base import ModelAdapter, Sample
from masq.models.qwen2_5_omni import Qwen25OmniAdapter
from masq.models.zoo import nano

KINDS = {"digits": ("vision",), "speech": ("audio",), "same": ("vision", "audio")}


def make_samples(num: int = 3) -> list[Sample]:
    """``num`` samples of each of four tasks, of mixed lengths."""
    samples = [
        Sample(f"{task}-test-{index}", task, one.question, one.answer, one.image, one.audio)
        for task, modalities in KINDS.items()
        for index, one in enumerate(nano.random_samples(modalities, num, seed=len(task)))
    ]
    passages = ["In the beginning", "Once upon a time there was", "Call me", "It was the best of times", "Far out"]
    return samples + [Sample(f"prose-test-{index}", "prose", "", passages[index % 5]) for index in range(num)]


def naive_nll(adapter: ModelAdapter, sample: Sample) -> list[float]:
    """NLL of each scored token on full logits in float64, one unpadded sample."""
    batch = adapter.encode([sample], with_answer=True)
    with torch.no_grad():
        log_p = adapter.model(**batch.inputs, use_cache=False).logits[0].double().log_softmax(-1)
    ids = batch.inputs["input_ids"][0].tolist()
    return [-float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)) if batch.answer_mask[0, t]]


CHOICES = [
    Sample("c-0", "choice", "Once upon", "a time", choices=("a time", "the roof", "x")),
    Sample("c-1", "choice", "In the beginning there", "was a word", choices=("were none", "was a word")),
    Sample("c-2", "choice", "Call me", "Ishmael", choices=("back later", "Ishmael", "by any other name")),
]


@pytest.fixture
def choices() -> list[Sample]:
    return list(CHOICES)


@pytest.fixture
def samples() -> list[Sample]:
    return make_samples()


@pytest.fixture
def make_model() -> Callable[..., ModelAdapter]:
    """nano_omni, its decoder weights disturbed by ``noise`` of their own size."""

    def make(noise: float = 0.0) -> ModelAdapter:
        adapter = Qwen25OmniAdapter(*nano.build("nano_omni"))
        generator = torch.Generator().manual_seed(11)
        for block in adapter.blocks():
            for parameter in block.module.parameters():
                disturbance = torch.randn(parameter.shape, generator=generator)
                parameter.data += noise * parameter.abs().mean() * disturbance
        return adapter

    return make

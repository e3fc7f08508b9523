"""Tiny quantized models of every kind that a checkpoint can hold, and the folders they are exported to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from masq.compensation.config import WhitenedLowRank
from masq.export import checkpoint
from masq.models.base import EncodedBatch, ModelAdapter
from masq.models.config import TAKES
from masq.models.zoo import nano
from masq.modules.modality import install
from masq.numerics.scheme import Override, Scheme, TensorFormat
from masq.pipeline.loop import quantize
from masq.pipeline.store import BlockStore
from masq.transforms.config import LearnedModalitySmoothing, ModalitySmoothing, SharedSmoothing
from masq.transforms.frame import HadamardRotation, ModalityCentring
from tests.nano_fixtures import NANO, nano_adapter, stages

GROUPED = TensorFormat(4, symmetric=False, granularity="per_group", group_size=8)
TOKEN = TensorFormat(8, granularity="per_token")
CELLS: dict[str, tuple[str, Scheme, dict[str, Any]]] = {
    "rtn": ("rtn", Scheme.preset("w4a8"), {}),
    "smoothquant": ("rtn", Scheme.preset("w8a8"), {"smoothing": SharedSmoothing()}),
    "run_time": ("rtn", Scheme.preset("w8a8"), {"smoothing": SharedSmoothing(fold=False)}),
    "masquant": ("masquant", Scheme.preset("w4a6"), {"smoothing": LearnedModalitySmoothing(epochs=1)}),
    "float32_factors": (
        "masquant",
        Scheme.preset("w4a8"),
        {
            "smoothing": LearnedModalitySmoothing(epochs=1),
            "compensation": WhitenedLowRank(rank_ratio=0.1, dtype="float32"),
        },
    ),
    "int8_factors": (
        "masquant",
        Scheme.preset("w4a8"),
        {
            "smoothing": LearnedModalitySmoothing(epochs=1),
            "compensation": WhitenedLowRank(rank_ratio=0.15, dtype="int8"),
        },
    ),
    "centred": (
        "rtn",
        Scheme.preset("w4a8"),
        {
            "centring": ModalityCentring(),
            "smoothing": ModalitySmoothing(),
            "compensation": WhitenedLowRank(rank_ratio=0.15, dtype="int8", gauge="text"),
        },
    ),
    "quarot": ("rtn", Scheme.preset("w4a8"), {"rotation": HadamardRotation()}),
    "w4a16": ("rtn", Scheme("w4a16_g8", GROUPED, None), {}),
    "mixed": (
        "rtn",
        Scheme(
            "mixed",
            TensorFormat(4),
            TOKEN,
            overrides=(Override(roles=("down",), skip=True), Override(blocks=(0,), weight_bits=8)),
        ),
        {"rotation": HadamardRotation(residual=False)},
    ),
}
KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    **{name: (TAKES[family][1:], ()) for name, family in NANO.items()},
    "nano_omni": (("vision",), (), ("audio",), ("vision", "audio")),
}


@dataclass
class Cell:
    """A quantized model, a mixed left-padded batch of prompts, and where it is exported to."""

    adapter: ModelAdapter
    prompts: EncodedBatch
    folder: Path


def make_cell(name: str, root: Path, model: str = "nano_omni") -> Cell:
    """Quantize a nano model and export it."""
    method, scheme, changes = CELLS[name]
    adapter = nano_adapter(model)
    context, _ = install(adapter)
    samples = [nano.random_samples(kind, 2, seed=5 + index) for index, kind in enumerate(KINDS[model])]
    batches = [adapter.encode(group, with_answer=True) for group in samples]
    chosen = stages(method, scheme, **changes)
    stores = {"blocks": BlockStore(root / "blocks"), "factors": BlockStore(root / "factors")}
    quantize(adapter, batches, chosen, context, **stores)
    prompts = adapter.encode([one for group in samples for one in group], with_answer=False)
    checkpoint.save(adapter, root / "exported", {"method": method})
    return Cell(adapter, prompts, root / "exported")


@pytest.fixture(scope="session")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cell]:
    """Cells by name, each made once; their models and folders are not to be changed."""
    made: dict[tuple[str, str], Cell] = {}

    def of(name: str, model: str = "nano_omni") -> Cell:
        if (name, model) not in made:
            made[name, model] = make_cell(name, tmp_path_factory.mktemp(name), model)
        return made[name, model]

    return of


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers, and its log through pytest."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").propagate = True
    yield
    transformers_logging.enable_progress_bar()

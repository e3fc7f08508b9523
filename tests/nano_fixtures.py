"""A tiny tri-modal model with calibration batches, for tests that need a whole decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from masq.calibration.replay import ReplayBatch, advance, capture
from masq.compensation.config import NoCompensation, WhitenedLowRank
from masq.models.base import EncodedBatch, ModelAdapter, Sample
from masq.models.loading import FAMILIES
from masq.models.qwen2_5_omni import Qwen25OmniAdapter
from masq.models.zoo import nano
from masq.modules.modality import ModalityContext, install
from masq.numerics.scheme import Scheme
from masq.pipeline.assembly import Stages
from masq.pipeline.store import BlockStore
from masq.rounding.config import NearestRounding
from masq.transforms.config import LearnedModalitySmoothing, NoSmoothing, SharedSmoothing

NANO = {"nano_vl": "qwen2_5_vl", "nano_omni": "qwen2_5_omni", **{name: name[5:] for name in nano.FURTHER}}
"""Family of the nano model of every family, by the model's name."""

KINDS = (("vision",), ("audio",), ("vision", "audio"), ())

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "smoothquant": {"smoothing": SharedSmoothing()},
    "mas": {"smoothing": LearnedModalitySmoothing(), "rounding": NearestRounding(per_modality=True)},
    "masquant": {"smoothing": LearnedModalitySmoothing(), "compensation": WhitenedLowRank(rank_ratio=0.1)},
    "qera": {"smoothing": SharedSmoothing(source="text"), "compensation": WhitenedLowRank(rank_ratio=0.1)},
}


def nano_adapter(name: str, **changes: Any) -> ModelAdapter:
    """Adapter of a nano model; keyword arguments go to ``nano.build``."""
    return FAMILIES.get(NANO[name])(*nano.build(name, **changes))


def media_of(adapter: ModelAdapter) -> tuple[str, ...]:
    """The media that a model takes, as ``nano.random_samples`` calls them."""
    return tuple(modality.name.lower() for modality in adapter.modalities if modality > 0)


class KilledError(RuntimeError):
    """What ends a run in ``killed_after``."""


@contextmanager
def killed_after(num_saves: int) -> Iterator[None]:
    """Let a walk save ``num_saves`` blocks, then end it; a walk that saves no more fails the test."""
    left, real = iter(range(num_saves)), BlockStore.save

    def crashing(self: BlockStore, *args: Any) -> None:
        if next(left, None) is None:
            raise KilledError
        real(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(BlockStore, "save", crashing)
        yield


def stages(method: str, scheme: str | Scheme = "w4a6", **changes: Any) -> Stages:
    """The stages of a method at a scheme."""
    scheme = Scheme.preset(scheme) if isinstance(scheme, str) else scheme
    slots = {"smoothing": NoSmoothing(), "rounding": NearestRounding(), "compensation": NoCompensation()}
    return Stages(**{**slots, **METHODS[method], "scheme": scheme, **changes})


@dataclass
class Nano:
    """A float model, its modality context, and encoded samples."""

    adapter: ModelAdapter
    context: ModalityContext
    samples: list[list[Sample]]
    batches: list[EncodedBatch]
    hidden: list[Any] = field(default_factory=list)
    replay: list[ReplayBatch] = field(default_factory=list)

    def targets(self, index: int = 0) -> list[Any]:
        """Float outputs of block ``index`` on the inputs of the first block."""
        block = self.adapter.blocks()[index]
        return [advance(block, hidden, batch, "block") for hidden, batch in zip(self.hidden, self.replay, strict=True)]


def make_nano(kinds: tuple[tuple[str, ...], ...] = KINDS, num_samples: int = 3) -> Nano:
    """Build nano_omni with one batch of mixed lengths per kind of sample."""
    adapter = Qwen25OmniAdapter(*nano.build("nano_omni"))
    context, _ = install(adapter)
    samples = [nano.random_samples(kind, num_samples, seed=3 + index) for index, kind in enumerate(kinds)]
    batches = [adapter.encode(group, with_answer=True) for group in samples]
    hidden, replay = capture(adapter, batches)
    return Nano(adapter, context, samples, batches, hidden, replay)


@pytest.fixture
def nano_model() -> Iterator[Nano]:
    """A fresh float model for each test."""
    yield make_nano()

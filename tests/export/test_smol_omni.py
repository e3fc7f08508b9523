"""The embedded trained model, exported and loaded again, answers what it answered before."""

from __future__ import annotations

import pytest
import torch

from masq.calibration.data import batches, load_samples
from masq.compensation.config import WhitenedLowRank
from masq.export import checkpoint
from masq.models.config import ModelConfig
from masq.models.loading import load
from masq.models.zoo import smol_omni
from masq.modules.modality import install
from masq.modules.packed_linear import pack_blocks
from masq.pipeline.loop import quantize
from masq.pipeline.store import BlockStore
from masq.transforms.config import ModalitySmoothing
from masq.transforms.frame import HadamardRotation
from tests.nano_fixtures import stages

CONFIG = ModelConfig("smol_omni", "qwen2_5_omni", "zoo:smol_omni", ("text", "vision", "audio"), dtype="float32")
METHODS = {
    "masquant": ("w4a8", {"smoothing": ModalitySmoothing(), "compensation": WhitenedLowRank(rank_ratio=0.05)}),
    "quarot": ("w4a8", {"rotation": HadamardRotation()}),
    "w4a16_g64": ("w4a16_g64", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_answers_are_the_same(tmp_path, method):
    scheme, changes = METHODS[method]
    adapter = load(CONFIG)
    context, _ = install(adapter)
    samples = load_samples(smol_omni.data_path("calibration"), ("read", "table", "speech", "same", "tale"), 2)
    encoded = [adapter.encode(group, with_answer=True) for group in batches(samples, 2)]
    stores = {"blocks": BlockStore(tmp_path / "blocks"), "factors": BlockStore(tmp_path / "factors")}
    quantize(adapter, encoded, stages("rtn", scheme, **changes), context, **stores)
    checkpoint.save(adapter, tmp_path / "out", {})
    pack_blocks(adapter.blocks())
    loaded = checkpoint.load(tmp_path / "out")
    asked = load_samples(smol_omni.data_path("evaluation"), ("read", "table", "speech", "same", "ask"), 2)
    batch = adapter.encode(asked, with_answer=False)
    with torch.no_grad():
        assert torch.equal(loaded(**batch.inputs).logits, adapter.model(**batch.inputs).logits)
    found, wanted = (one.generate(**batch.inputs, max_new_tokens=12) for one in (loaded, adapter.model))
    assert torch.equal(found, wanted)
    texts = {adapter.decode(row) for row in found[:, batch.inputs["input_ids"].shape[1] :].tolist()}
    assert len(texts) > 5

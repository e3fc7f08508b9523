"""A rotated model computes what it computed, on every modality, and its residual stream comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from masq.errors import ConfigError, ModelError
from masq.evaluation.fidelity import fidelity
from masq.models.base import ModelAdapter, Role
from masq.models.config import TAKES
from masq.models.loading import FAMILIES
from masq.models.rotated import RotatedInput
from masq.models.zoo import nano
from masq.transforms.frame import HadamardRotation
from masq.transforms.rotation import rotate_model
from tests.nano_fixtures import NANO

KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    **{name: ((), TAKES[family][1:]) for name, family in NANO.items()},
    "nano_omni": ((), ("vision",), ("audio",), ("vision", "audio")),
}
ROTATIONS = {
    "residual": HadamardRotation(heads=False, down=False),
    "heads": HadamardRotation(residual=False, down=False),
    "down": HadamardRotation(residual=False, heads=False),
    "all": HadamardRotation(),
}


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> ModelAdapter:
    model, processor = nano.build(name, **options)
    return FAMILIES.get(NANO[name])(model.to(dtype), processor)


def logits(adapter: ModelAdapter, kinds: tuple[str, ...]) -> torch.Tensor:
    batch = adapter.encode(nano.random_samples(kinds, 3, seed=1), with_answer=True)
    dtype = adapter.head().weight.dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
    with torch.no_grad():
        out = adapter.model(**inputs, use_cache=False).logits
    return out[batch.modality >= 0]


# Rotary angles and norms stay in float32 inside transformers, which bounds the agreement.
@pytest.mark.parametrize("rotation", list(ROTATIONS))
@pytest.mark.parametrize(("name", "kinds"), [(name, kinds) for name, all_kinds in KINDS.items() for kinds in all_kinds])
def test_logits_stay(name: str, kinds: tuple[str, ...], rotation: str) -> None:
    adapter = build(name)
    before = logits(adapter, kinds)
    rotate_model(adapter, ROTATIONS[rotation], seed=3)
    torch.testing.assert_close(logits(adapter, kinds), before, rtol=1e-4, atol=2e-5 * float(before.abs().max()))


def test_the_weights_did_change_and_the_head_is_untied() -> None:
    adapter = build("nano_vl", tied=True)
    assert adapter.head().weight is adapter.embeddings().weight
    old = {role: adapter.blocks()[0].linear(role).weight.clone() for role in Role}
    rotate_model(adapter, HadamardRotation(), seed=0)
    assert adapter.head().weight is not adapter.embeddings().weight
    assert not any(torch.allclose(adapter.blocks()[0].linear(role).weight, old[role]) for role in Role)


def test_the_seed_chooses_the_signs() -> None:
    weights = []
    for seed in (0, 0, 1):
        adapter = build("nano_vl")
        rotate_model(adapter, HadamardRotation(), seed)
        weights.append(adapter.blocks()[1].linear(Role.DOWN).weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_adapters_look_through_the_run_time_rotation() -> None:
    adapter = build("nano_vl")
    rotate_model(adapter, ROTATIONS["down"], seed=0)
    block = adapter.blocks()[0]
    assert isinstance(block.module.mlp.down_proj, RotatedInput)
    assert isinstance(block.linear(Role.DOWN), torch.nn.Linear)
    replacement = torch.nn.Linear(88, 48)
    block.set_linear(Role.DOWN, replacement)
    assert block.linear(Role.DOWN) is replacement
    assert block.module.mlp.down_proj.linear is replacement


def test_fidelity_compares_in_the_model_s_own_basis(tmp_path: Path) -> None:
    reference, rotated = build("nano_omni", torch.float32), build("nano_omni", torch.float32)
    rotate_model(rotated, HadamardRotation(), seed=0)
    samples = [nano.random_samples(kinds, 2, seed=5) for kinds in KINDS["nano_omni"]]
    result = fidelity(reference, rotated, samples, tmp_path)
    assert min(result["sqnr"].values()) > 80
    assert max(result["kl"].values()) < 1e-6


def test_an_outlier_channel_is_spread() -> None:
    adapter = build("nano_omni")
    adapter.embeddings().weight.data[:, 7] *= 100
    before = adapter.embeddings().weight.detach().clone()
    rotate_model(adapter, ROTATIONS["residual"], seed=0)
    after = adapter.embeddings().weight.detach()
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))

    def peak(weight: torch.Tensor) -> float:
        return float((weight.abs().amax(1) / weight.norm(dim=1)).mean())

    assert peak(after) < 0.5 * peak(before)


def test_norms_that_do_not_commute_are_refused() -> None:
    adapter = build("nano_omni")
    adapter.final_norm().bias = torch.nn.Parameter(torch.zeros(48, dtype=torch.float64))
    with pytest.raises(ModelError, match="no bias"):
        rotate_model(adapter, HadamardRotation(), seed=0)
    with pytest.raises(ConfigError, match="must rotate something"):
        HadamardRotation(residual=False, heads=False, down=False)

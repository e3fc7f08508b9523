"""Activations of up to four bits, cut off at a share of the range of their rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from masq.config import RunConfig, decode, to_dict
from masq.errors import ConfigError
from masq.export import checkpoint
from masq.finished import load_finished, stages_of
from masq.identity import identity
from masq.models.zoo import nano
from masq.modules.quant_linear import QuantLinear
from masq.numerics.scheme import Override, Scheme, TensorFormat
from masq.run import run
from tests.test_run import METHODS, plain, splits  # noqa: F401


def config(splits: dict[str, Path], root: Path, bits: int, rounding: dict[str, Any], **changes: Any) -> RunConfig:  # noqa: F811
    raw = plain(splits, root, "rtn", **changes)
    raw["method"] |= {"rotation": METHODS["quarot_gptq"]["rotation"], "rounding": rounding}
    activation = {"bits": bits, "granularity": "per_token"}
    raw["scheme"] = {"name": f"w4a{bits}", "weight": {"bits": 4}, "activation": activation}
    raw["evaluation"] |= {"score": False, "samples_per_task": 1}
    return decode(raw)


CLIPPED = {"kind": "gptq", "activation_clip": 0.85}


def test_only_narrow_activations_are_clipped() -> None:
    scheme = replace(
        Scheme.preset("w4a4"), name="mixed", overrides=(Override(roles=("down",), activation_bits=8),)
    ).clipped(0.85)
    found = {role: one.activation for role, one in scheme.formats.items()}
    assert all(one is not None for one in found.values())
    assert {role: one.clip for role, one in found.items() if one} == {
        role: 1.0 if role == "down" else 0.85 for role in found
    }
    assert Scheme.preset("w4a16").clipped(0.85) == Scheme.preset("w4a16")
    assert Scheme.preset("w4a4").clipped(1.0) == Scheme.preset("w4a4")
    assert {one.activation for one in Scheme.preset("w4a8").clipped(0.85).formats.values()} == {
        TensorFormat(8, granularity="per_token")
    }


def test_a_clip_without_effect_makes_no_other_run(splits: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    keys = {
        (bits, clip): identity(config(splits, tmp_path, bits, {"kind": "gptq", "activation_clip": clip}), {})
        for bits in (4, 8)
        for clip in (1.0, 0.85)
    }
    assert keys[8, 1.0] == keys[8, 0.85]
    assert keys[4, 1.0] != keys[4, 0.85]
    assert keys[4, 1.0] == identity(config(splits, tmp_path, 4, {"kind": "gptq"}), {})


@pytest.mark.parametrize("kind", ["nearest", "gptq"])
@pytest.mark.parametrize("value", [0.0, 1.5, -1.0])
def test_shares_that_are_none_are_refused(splits: dict[str, Path], tmp_path: Path, kind: str, value: float) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="activation_clip must lie above 0"):
        config(splits, tmp_path, 4, {"kind": kind, "activation_clip": value})


def test_a_scheme_does_not_say_it(splits: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    raw = to_dict(config(splits, tmp_path, 4, CLIPPED))
    raw["scheme"]["name"] = "mine"
    raw["scheme"]["activation"]["clip"] = 0.9
    with pytest.raises(ConfigError, match=r"activation_clip"):
        decode(raw)


@pytest.mark.parametrize("method", [CLIPPED, {"kind": "nearest", "activation_clip": 0.85}])
def test_simulated_packed_and_exported_alike(splits: dict[str, Path], tmp_path: Path, method: dict[str, Any]) -> None:  # noqa: F811
    found = {}
    for execution in ("simulated", "packed"):
        cell = config(splits, tmp_path / execution, 4, method, execution=execution)
        found[execution] = run(cell)
        assert {one.activation.clip for one in stages_of(cell).scheme.formats.values() if one.activation} == {0.85}
    for key in ("sqnr", "nll"):
        assert found["packed"].fidelity[key] == pytest.approx(found["simulated"].fidelity[key], rel=1e-3)
    adapter = load_finished(next(path.parent for path in (tmp_path / "simulated").glob("*/record.json")))
    layers = [one for one in adapter.model.modules() if isinstance(one, QuantLinear)]
    assert {one.activation.clip for one in layers if one.activation} == {0.85}
    assert checkpoint.save(adapter, tmp_path / "out", {}).version == 4
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    batch = adapter.encode(nano.random_samples(("vision", "audio"), 2), with_answer=False)
    with torch.no_grad():
        logits, wanted = loaded(**batch.inputs).logits, adapter.model(**batch.inputs).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)

from __future__ import annotations

import torch

from masq.calibration.statistics import GroupStatistics
from masq.models.base import Modality
from masq.numerics.affine import quantize
from masq.numerics.scheme import TensorFormat
from masq.rounding.config import ClipSearch, GptqRounding, NearestRounding
from masq.rounding.stages import ROUNDING, pooled_moment


def test_pooled_moment_counts_every_token_once() -> None:
    rows = {Modality.TEXT: torch.randn(5, 4).double(), Modality.VISION: torch.randn(20, 4).double()}
    statistics = GroupStatistics(
        second_moment={m: x.t() @ x / len(x) for m, x in rows.items()}, num_tokens={m: len(x) for m, x in rows.items()}
    )
    factors = {Modality.TEXT: torch.rand(4) + 0.5, Modality.VISION: torch.rand(4) + 0.5}
    smoothed = torch.cat([x / factors[m].double() for m, x in rows.items()])
    torch.testing.assert_close(pooled_moment(statistics, factors), smoothed.t() @ smoothed / 25)
    plain = torch.cat(list(rows.values()))
    torch.testing.assert_close(pooled_moment(statistics, {}), plain.t() @ plain / 25)
    torch.testing.assert_close(pooled_moment(statistics, {}, (Modality.TEXT,)), statistics.second_moment[Modality.TEXT])
    assert pooled_moment(GroupStatistics(), {}) is None


def test_every_stage_returns_codes_of_the_format() -> None:
    weight, fmt = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double(), TensorFormat(4)
    configs = {"nearest": NearestRounding(), "gptq": GptqRounding()}
    assert set(configs) == set(ROUNDING.names())
    for name, config in configs.items():
        rounded = ROUNDING.get(name)(weight, fmt, config, torch.eye(12, dtype=torch.float64))
        assert torch.equal(rounded.weight.codes, quantize(weight, fmt).codes)
        assert rounded.fallback is None


def test_gptq_without_a_token_to_look_at_is_a_typed_result() -> None:
    weight, fmt = torch.randn(5, 12).double(), TensorFormat(4)
    rounded = ROUNDING.get("gptq")(weight, fmt, GptqRounding(tokens="text"), None)
    assert rounded.fallback == "rounded to nearest, no calibration token to round against"
    assert torch.equal(rounded.weight.codes, quantize(weight, fmt).codes)


def test_gptq_tells_what_it_did_otherwise_than_asked() -> None:
    weight, fmt = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double(), TensorFormat(4)
    gptq = ROUNDING.get("gptq")
    dead = torch.eye(12, dtype=torch.float64)
    dead[3, 3] = 0
    assert gptq(weight, fmt, GptqRounding(), dead).fallback == "1 input channels never active, rounded to nearest"
    # Indefinite by more than the configured damping, by less than ten times it.
    indefinite = torch.eye(12, dtype=torch.float64)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    assert gptq(weight, fmt, GptqRounding(), indefinite).fallback == "damping raised to 0.1"
    zero = torch.zeros(12, 12, dtype=torch.float64)
    assert gptq(weight, fmt, GptqRounding(), zero).fallback == "rounded to nearest, singular Hessian"


def test_the_record_says_what_happened_to_a_linear() -> None:
    weight, fmt = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double(), TensorFormat(4)
    gptq, nearest = ROUNDING.get("gptq"), ROUNDING.get("nearest")
    dead = torch.eye(12, dtype=torch.float64)
    dead[3, 3] = dead[7, 7] = 0
    text = "2 input channels never active, rounded to nearest"
    expected = {"gain": 1.0, "damping": 0.01, "dead_channels": 2, "fallback": text}
    assert gptq(weight, fmt, GptqRounding(), dead).to_dict() == expected
    zero = torch.zeros(12, 12, dtype=torch.float64)
    singular = {"gain": 1.0, "dead_channels": 12, "fallback": "rounded to nearest, singular Hessian"}
    assert gptq(weight, fmt, GptqRounding(), zero).to_dict() == singular
    clipped = gptq(weight, fmt, GptqRounding(clip=ClipSearch()), dead).to_dict()
    assert set(clipped) == {"gain", "clip_ratio", "damping", "dead_channels", "fallback"}
    assert nearest(weight, fmt, NearestRounding(), None).to_dict() == {"gain": 1.0}

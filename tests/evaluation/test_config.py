from __future__ import annotations

from typing import Any

import pytest

from masq.decoding import decode_dataclass
from masq.errors import ConfigError
from masq.evaluation.config import EvaluationConfig


def test_the_split_is_the_evaluation_one_unless_asked() -> None:
    assert EvaluationConfig().split == "evaluation"
    assert decode_dataclass(EvaluationConfig, {"split": "final"}).split == "final"
    assert EvaluationConfig(source="own.parquet").split == "evaluation"


def test_unknown_splits_and_splits_of_a_file_are_refused() -> None:
    wrong: Any = "finale"
    with pytest.raises(ConfigError, match="evaluation or final"):
        EvaluationConfig(split=wrong)
    with pytest.raises(ConfigError, match="split has an unknown value.*Did you mean final"):
        decode_dataclass(EvaluationConfig, {"split": wrong})
    with pytest.raises(ConfigError, match="only the data of an embedded model have a final split.*own.parquet"):
        EvaluationConfig(split="final", source="own.parquet")

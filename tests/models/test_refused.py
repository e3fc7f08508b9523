"""Models that masq does not take: refused by name and by folder before anything is read, and by what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from masq.errors import ConfigError, ModelError
from masq.models.config import ModelConfig
from masq.models.loading import load
from masq.models.qwen3_vl import Qwen3VLAdapter
from masq.models.refused import REFUSED, REFUSED_FAMILIES
from masq.models.zoo import nano

CLASSES = sorted({one.model for one in REFUSED.values() if one.model.isidentifier()})
NESTED: dict[str, dict[str, Any]] = {
    "an Omni folder": {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": {}}},
    "a language model of experts": {"model_type": "internvl", "text_config": {"model_type": "qwen3_moe"}},
    **{name: {"model_type": name} for name in REFUSED},
}


def config(source: Path | str, family: Any = "internvl") -> ModelConfig:
    return ModelConfig("some", family, str(source), ("text", "vision"))


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_a_family_is_refused_by_its_name(family: str) -> None:
    refusal = REFUSED[REFUSED_FAMILIES[family]]
    with pytest.raises(ConfigError) as caught:
        config("owner/name", family)
    assert refusal.model in str(caught.value)
    assert refusal.reason in str(caught.value)
    assert "for example" in str(caught.value.remedy)


@pytest.mark.parametrize("name", NESTED)
def test_a_folder_is_refused_by_its_configuration(tmp_path: Path, name: str) -> None:
    """Class, reason and remedy; there are no weights to be read."""
    (tmp_path / "config.json").write_text(json.dumps(NESTED[name]))
    with pytest.raises(ModelError, match=r"must (have one linear|be a class).*use a (dense )?model|Use a"):
        load(config(tmp_path))


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_are_those_of_transformers(name: str) -> None:
    assert hasattr(transformers, name)


def tiny(text: dict[str, Any]) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}
    return {**sizes, "intermediate_size": 16, **text}


def test_the_experts_of_qwen3_omni_are_no_linears() -> None:
    """The reason, true of the class: what computes gate, up and down are parameters with a row for every expert."""
    from transformers import Qwen3OmniMoeThinkerTextModel
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig

    experts = {"num_hidden_layers": 1, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = Qwen3OmniMoeThinkerTextModel(Qwen3OmniMoeTextConfig(**tiny(experts)))
    stacked = model.layers[0].mlp.experts
    assert stacked.gate_up_proj.shape == (3, 16, 16)
    assert stacked.down_proj.shape == (3, 16, 8)
    assert not [one for one in stacked.modules() if isinstance(one, torch.nn.Linear)]


def test_most_blocks_of_minicpm_v_have_no_query() -> None:
    from transformers import MiniCPMV4_6Config

    kinds = MiniCPMV4_6Config().text_config.layer_types
    assert kinds.count("linear_attention") > len(kinds) / 2


def test_a_block_without_a_role_is_refused_whatever_it_is_called() -> None:
    """Also where the configuration said nothing: the blocks themselves are looked at."""
    model, processor = nano.build("nano_qwen3_vl")
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 8, 48))
    model.model.language_model.layers[1].mlp = experts
    with pytest.raises(ModelError, match=r"block 1, a Qwen3VLTextDecoderLayer, has no linear mlp.gate_proj for gate"):
        Qwen3VLAdapter(model, processor)

"""Models that transformers has, or whose checkpoints are well known, and that masq does not take: which, and why.

No torch here: a refusal comes before anything is imported or read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model is not taken.

    Attributes:
        model: its class in transformers, or what it is.
        rule: what masq asks of a model.
        reason: what this one has instead.
        remedy: what to do.
    """

    model: str
    rule: str
    reason: str
    remedy: str

    @property
    def value(self) -> str:
        """Class and reason, for an error."""
        return f"{self.model}: {self.reason}"


LINEARS = "every decoder block must have one linear each for query, key, value, output, gate, up and down"
"""What masq asks of a block."""

_EXPERTS = "its experts are stacked three-dimensional parameters (mlp.experts.gate_up_proj, down_proj), not linears"
_DELTA = (
    "its language model is Qwen3.5, most of whose blocks are gated delta nets (linear attention) without query, key "
    "and value, and whose other blocks gate what query computes"
)
_DENSE = "use a dense model, for example qwen2_5_omni_7b or qwen3_vl_8b"
_OTHER = "use a model of a family that masq takes, for example internvl3_8b or qwen3_vl_4b"


def _experts(model: str) -> Refusal:
    return Refusal(model, LINEARS, _EXPERTS, _DENSE)


REFUSED: dict[str, Refusal] = {
    "qwen3_omni_moe": _experts("Qwen3OmniMoeThinkerForConditionalGeneration"),
    "qwen3_omni_moe_thinker": _experts("Qwen3OmniMoeThinkerForConditionalGeneration"),
    "qwen3_vl_moe": _experts("Qwen3VLMoeForConditionalGeneration"),
    "qwen3_moe": _experts("a language model of the class Qwen3MoeForCausalLM"),
    "gpt_oss": _experts("a language model of the class GptOssForCausalLM"),
    "minicpmv4_6": Refusal("MiniCPMV4_6ForConditionalGeneration", LINEARS, _DELTA, _OTHER),
    "minicpmv4_7": Refusal("MiniCPMV4_7ForConditionalGeneration", LINEARS, _DELTA, _OTHER),
    "minicpmv": Refusal(
        "MiniCPM-V up to 4.5",
        "a model must be a class of the installed transformers",
        "its checkpoints bring their own code, and transformers has no class for them",
        _OTHER,
    ),
}
"""By ``model_type`` of a configuration, or of the language model inside it."""

REFUSED_FAMILIES = {"minicpm_v": "minicpmv4_6", "qwen3_omni_moe": "qwen3_omni_moe"}
"""What somebody may call such a model as ``model.family``: its key in ``REFUSED``."""


def refusal_of(config: Mapping[str, Any]) -> Refusal | None:
    """Why the model of a checkpoint's ``config.json`` is refused; None where nothing is known against it."""
    outer = config.get("thinker_config", config)
    inner = outer.get("text_config") if isinstance(outer, dict) else None
    types = [config.get("model_type"), inner.get("model_type") if isinstance(inner, dict) else None]
    return next((REFUSED[name] for name in types if isinstance(name, str) and name in REFUSED), None)

"""smol_vl: ``smol_omni`` without its ears, as a Qwen2.5-VL model.

Nothing of its own is shipped: language model, adapter and vision tower are those of ``smol_omni``. What differs between
the two classes is the configuration, and the vision tower's query, key and value, which Qwen2.5-VL computes at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from masq.models.zoo import smol_omni

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

_EARS = "model.audio_tower."
_QUERY, _KEY, _VALUE = ".attn.q.", ".attn.k.", ".attn.v."


def build_model(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Qwen2_5_VLForConditionalGeneration:
    """Assemble the model in evaluation mode from the weights of ``smol_omni``.

    Raises:
        ModelError: the package with the language model is missing, or a weight does not fit.
        DataError: a shipped file is missing or damaged.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    omni = smol_omni.build_model(dtype, device)
    with no_init_weights():
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**convert_config(omni.config)))
    # The tensors are taken over, not copied: the language model exists once. The tied head is no part of the state.
    state = {name: value for name, value in convert_state(omni.state_dict()).items() if name != "lm_head.weight"}
    smol_omni.fill(model, state, remedy="install the version of transformers in .ci/constraints.txt", assign=True)
    model.generation_config = omni.generation_config
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return model.eval()


def build_processor() -> Qwen2_5_VLProcessor:
    """The processor: tokenizer, pictures and chat template of ``smol_omni``."""
    from transformers import Qwen2_5_VLProcessor

    omni: Any = smol_omni.build_processor()
    return Qwen2_5_VLProcessor(
        omni.image_processor, omni.tokenizer, omni.video_processor, chat_template=smol_omni.CHAT_TEMPLATE
    )


def convert_config(omni: Any) -> dict[str, Any]:
    """Keyword arguments of ``Qwen2_5_VLConfig`` for the configuration of a Qwen2.5-Omni thinker."""
    text, vision = (
        {name: value for name, value in config.to_dict().items() if name not in ("model_type", "dtype")}
        for config in (omni.text_config, omni.vision_config)
    )
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": omni.image_token_id,
        "video_token_id": omni.video_token_id,
        "vision_start_token_id": omni.vision_start_token_id,
        "vision_end_token_id": omni.vision_end_token_id,
        "tie_word_embeddings": omni.tie_word_embeddings,
    }


def convert_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A thinker's state dict under the names of Qwen2.5-VL: no audio tower, query, key and value of vision fused.

    Args:
        state: weights and biases by name; of a vision block q, k and v are [d, d] and [d].

    Returns:
        The same tensors, but for the fused [3 d, d] and [3 d].
    """
    converted = {}
    for name, value in state.items():
        if name.startswith(_EARS) or _KEY in name or _VALUE in name:
            continue
        if _QUERY in name:
            parts = [state[name.replace(_QUERY, part)] for part in (_QUERY, _KEY, _VALUE)]
            converted[name.replace(_QUERY, ".attn.qkv.")] = torch.cat(parts)
        else:
            converted[name] = value
    return converted

"""nano_internvl: a tiny InternVL whose pictures become up to four crops and a thumbnail."""

from __future__ import annotations

from typing import Any

import torch

from masq.models.zoo import nano

TIED = False
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SIDE = 4 * nano.PATCH
PIECES = (SIDE // nano.PATCH // 2) ** 2
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_bias": True,
    "image_size": [SIDE, SIDE],
    "patch_size": [nano.PATCH, nano.PATCH],
}


def make(tied: bool, attention: str) -> tuple[Any, Any]:
    """The model, its weights still to be drawn, and its processor."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    processor = _processor()
    tokenizer = processor.tokenizer
    config = InternVLConfig(
        text_config={**nano.text_config(tokenizer, tied), "model_type": "qwen2", "rope_parameters": nano.PLAIN_ROPE},
        vision_config=dict(VISION),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=PIECES,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model, processor


def _processor() -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": SIDE, "width": SIDE}
    template = nano.chat_template({"image": "<IMG_CONTEXT>\n", "video": "<video>\n"})
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=dict(size), crop_to_patches=True, min_patches=1, max_patches=4),
        nano.build_tokenizer(TOKENS, template),
        InternVLVideoProcessor(size=dict(size), do_sample_frames=False),
        image_seq_length=PIECES,
        chat_template=template,
    )

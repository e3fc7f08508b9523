"""nano_qwen3_vl: a tiny Qwen3-VL with heads wider than their share, and features for the first two of three blocks."""

from __future__ import annotations

from typing import Any

import torch

from masq.models.zoo import nano

TIED = True
TOKENS = {
    **nano.SPECIAL_TOKENS["nano_vl"],
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
HEAD_DIM = 16
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "patch_size": nano.PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
    "out_hidden_size": nano.SIZES["hidden_size"],
}


def make(tied: bool, attention: str) -> tuple[Any, Any]:
    """The model, its weights still to be drawn, and its processor."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    processor = _processor()
    tokenizer = processor.tokenizer
    text = nano.text_config(tokenizer, tied)
    config = Qwen3VLConfig(
        text_config={**text, "head_dim": HEAD_DIM, "rope_parameters": dict(ROPE)},
        vision_config=dict(VISION),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
        tie_word_embeddings=tied,
    )
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model, processor


def _processor() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    size: dict[str, Any] = {"shortest_edge": nano.MIN_PIXELS, "longest_edge": nano.MAX_PIXELS}
    geometry: dict[str, Any] = {"patch_size": nano.PATCH, "temporal_patch_size": 2, "merge_size": 2}
    # The processor itself wraps every frame of a video, behind its time.
    template = nano.chat_template({**nano.wrapped_media(TOKENS), "video": TOKENS["video_token"]})
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=dict(size), **geometry),
        nano.build_tokenizer(TOKENS, template),
        Qwen3VLVideoProcessor(size=dict(size), do_sample_frames=False, cap_pixels_per_frame=False, **geometry),
        chat_template=template,
    )

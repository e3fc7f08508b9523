"""The on-disk layout in which Qwen publishes Qwen2.5-VL and Qwen2.5-Omni, written for a random model.

It differs from what ``save_pretrained`` of transformers 5 writes: flat or nested configurations of 2025, weight names
without ``language_model``, Omni's thinker among the shards of its speech parts, and one preprocessor file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

RENAMED = {"model.language_model.": "model.", "model.visual.": "visual.", "model.audio_tower.": "audio_tower."}


def write(model: Any, processor: Any, folder: Path, max_shard_size: int) -> None:
    """Write weights, configurations and the processor's files.

    VL: ``model.layers.*``, ``visual.*``, ``lm_head.*``. Omni: ``thinker.*`` interleaved with junk ``talker.*`` and
    ``token2wav.*`` tensors. Shards with an index; a tied head is not stored.

    Args:
        model: a ``Qwen2_5_VLForConditionalGeneration`` or ``Qwen2_5OmniThinkerForConditionalGeneration``.
        processor: its processor.
        folder: created if need be.
        max_shard_size: bytes of a shard; it holds at least one tensor.
    """
    write_description(model, processor, folder)
    tensors = {published_name(model, name): value.detach().clone() for name, value in model.named_parameters()}
    _write_shards(_with_speech_parts(tensors) if _is_omni(model) else tensors, folder, max_shard_size)


def write_description(model: Any, processor: Any, folder: Path) -> None:
    """Write everything but the weights; the model may be on the meta device.

    Args:
        model: see ``write``.
        processor: see ``write``.
        folder: created if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _omni_config(model) if _is_omni(model) else _vl_config(model))
    _write_json(folder / "generation_config.json", _sampling(model))
    _write_processor(processor, folder)


def published_name(model: Any, name: str) -> str:
    """Under which name Qwen publishes the parameter ``name``."""
    old = next((start for start in RENAMED if name.startswith(start)), "")
    return ("thinker." if _is_omni(model) else "") + RENAMED.get(old, "") + name.removeprefix(old)


def _is_omni(model: Any) -> bool:
    return model.config.model_type == "qwen2_5_omni_thinker"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _sampling(model: Any) -> dict[str, Any]:
    """Sampling defaults strong enough that a decoder which took them over would be found out."""
    end = model.config.text_config.eos_token_id
    return {"do_sample": True, "temperature": 5.0, "top_k": 50, "repetition_penalty": 1.5, "eos_token_id": [end]}


def _write_processor(processor: Any, folder: Path) -> None:
    """Tokenizer files, one preprocessor_config.json for pictures and sound, chat_template.json."""
    processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write_json(folder / "chat_template.json", {"chat_template": processor.chat_template})
    image = processor.image_processor
    content = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": type(processor).__name__,
        "min_pixels": image.size["shortest_edge"],
        "max_pixels": image.size["longest_edge"],
        **{key: getattr(image, key) for key in ("patch_size", "temporal_patch_size", "merge_size")},
        **{key: list(getattr(image, key)) for key in ("image_mean", "image_std")},
    }
    extractor = getattr(processor, "feature_extractor", None)
    if extractor is not None:
        keys = ("chunk_length", "feature_size", "hop_length", "n_fft", "n_samples", "nb_max_frames", "sampling_rate")
        content |= {key: getattr(extractor, key) for key in keys}
        content |= {"feature_extractor_type": "WhisperFeatureExtractor", "return_attention_mask": True}
    _write_json(folder / "preprocessor_config.json", content)


def _text_config(model: Any) -> dict[str, Any]:
    text = model.config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    text.pop("layer_types", None)
    return {
        **{key: value for key, value in text.items() if value is not None},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }


def _vision_config(model: Any, model_type: str) -> dict[str, Any]:
    vision = model.config.vision_config.to_dict()
    vision.pop("rope_parameters", None)
    return {**vision, "model_type": model_type, "in_chans": 3, "spatial_patch_size": vision["patch_size"]}


def _vl_config(model: Any) -> dict[str, Any]:
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        **_text_config(model),
        **{key: getattr(model.config, key) for key in ids},
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "torch_dtype": "float32",
        "vision_config": _vision_config(model, "qwen2_5_vl"),
    }


def _omni_config(model: Any) -> dict[str, Any]:
    text = _text_config(model)
    text["rope_scaling"] |= {"type": "default", "rope_type": "default"}
    thinker = model.config.to_dict() | {
        "text_config": text,
        "vision_config": _vision_config(model, "qwen2_5_omni_vision_encoder"),
        "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
    }
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "torch_dtype": "float32",
        "thinker_config": thinker,
        "talker_config": {"model_type": "qwen2_5_omni_talker", "hidden_size": 8, "num_hidden_layers": 1},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    }


def _with_speech_parts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The thinker's tensors with a talker's and a token2wav's in between, so that they share shards."""
    mixed: dict[str, torch.Tensor] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        mixed[f"talker.model.layers.{index}.self_attn.q_proj.weight"] = torch.full((8, 8), float(index))
        mixed[name] = tensor
        mixed[f"token2wav.code2wav_dit_model.{index}.bias"] = torch.full((8,), float(index))
    return mixed


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: int) -> None:
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        filled = sum(stored.nbytes for stored in shards[-1].values())
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file_name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", content)

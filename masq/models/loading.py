"""From a ``ModelConfig`` to a ready ``ModelAdapter``: embedded models, checkpoint folders, hub ids.

A checkpoint is read by transformers' own ``from_pretrained`` with its own mapping of published names, safetensors only.
Whatever can be checked without reading weights is checked first.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import ModelError
from masq.files import SCRATCH, require_writable_folder
from masq.models import checkpoint
from masq.models.base import Modality
from masq.models.config import RESIDENT_SHARE
from masq.models.residence import StreamedResidence
from masq.models.streaming import CheckpointWeights, WrittenWeights, skeleton
from masq.models.zoo import PREFIX, embedded_name
from masq.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from masq.models.base import ModelAdapter
    from masq.models.config import ModelConfig

logger = logging.getLogger(__name__)

FAMILIES: Registry[Any] = Registry("model family")
FAMILIES.register("qwen2_5_vl", "masq.models.qwen2_5_vl:Qwen25VLAdapter")
FAMILIES.register("qwen2_5_omni", "masq.models.qwen2_5_omni:Qwen25OmniAdapter")
FAMILIES.register("qwen3_vl", "masq.models.qwen3_vl:Qwen3VLAdapter")
FAMILIES.register("qwen2_audio", "masq.models.qwen2_audio:Qwen2AudioAdapter")
FAMILIES.register("llava_onevision", "masq.models.llava_onevision:LlavaOnevisionAdapter")
FAMILIES.register("internvl", "masq.models.internvl:InternVLAdapter")

ZOO: Registry[Any] = Registry("embedded model")
ZOO.register("nano_vl", "masq.models.zoo.nano:load")
ZOO.register("nano_omni", "masq.models.zoo.nano:load")
ZOO.register("nano_qwen3_vl", "masq.models.zoo.nano:load")
ZOO.register("nano_qwen2_audio", "masq.models.zoo.nano:load")
ZOO.register("nano_llava_onevision", "masq.models.zoo.nano:load")
ZOO.register("nano_internvl", "masq.models.zoo.nano:load")
ZOO.register("smol_omni", "masq.models.loading:load_smol_omni")
ZOO.register("smol_vl", "masq.models.loading:load_smol_vl")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
DOWNLOADED_CODE = "*.py"
_ALIGNMENT = 64


def load(config: ModelConfig, scratch: Path | None = None) -> ModelAdapter:
    """Load a float model and its processor.

    Args:
        config: family, source and precision.
        scratch: folder on a disk for what a streamed model writes; the system's temporary folder by default.

    Returns:
        The adapter, its model in evaluation mode on the configured device; its ``modalities`` are the configured ones.

    Raises:
        ConfigError: unknown family or embedded model.
        ModelError: a modality that the family lacks, an unavailable device, a wrong, missing or truncated checkpoint.
    """
    family = FAMILIES.get(config.family)
    modalities = _modalities(config, family)
    device = _device(config.device)
    folder = source_folder(config)
    streamed, source = streams(config, folder), None
    if folder is None:
        model, processor = _from_zoo(config, family)
    else:
        model, processor, source = _from_checkpoint(folder, config, family, streamed=streamed)
    # Gradients are only ever asked for of masq's own parameters.
    model.requires_grad_(False)
    model = model if streamed else model.to(device)
    adapter = family(model, processor, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    adapter.modalities = modalities
    if streamed:
        adapter.residence = _streamed(adapter, source, device, scratch or Path(tempfile.gettempdir()))
        with adapter.residence.present(*adapter.staying_parts(), after="stay"):
            pass
    return adapter


def streams(config: ModelConfig, folder: Path | None) -> bool:
    """Whether the weights of a model are streamed from ``folder`` (None for an embedded model)."""
    if config.weights != "auto" or folder is None:
        return config.weights == "streamed"
    import psutil

    entries = checkpoint.headers(folder).items()
    kept = [one["shape"] for name, one in entries if not name.startswith(checkpoint.SKIPPED_PREFIXES)]
    num_bytes = sum(map(math.prod, kept)) * getattr(torch, config.dtype).itemsize
    return num_bytes > psutil.virtual_memory().available * RESIDENT_SHARE


def _streamed(
    adapter: ModelAdapter, source: CheckpointWeights | None, device: torch.device, scratch: Path
) -> StreamedResidence:
    """The residence of a model on the meta device, or of one in memory, which is written to disk first."""
    if source is not None:
        return StreamedResidence(adapter.model, adapter.parts(), source, device, scratch)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=require_writable_folder(scratch)))
    written = WrittenWeights(adapter.model, folder / "model.safetensors")
    residence = StreamedResidence(adapter.model, adapter.parts(), written, device, scratch)
    weakref.finalize(residence, shutil.rmtree, folder, ignore_errors=True)
    return residence


def source_folder(config: ModelConfig) -> Path | None:
    """The checkpoint folder behind a configuration, its files checked; None for an embedded model.

    A hub id is downloaded, or found in the local cache.

    Raises:
        ConfigError: unknown family.
        ModelError: no such folder or hub id, or a wrong, missing or truncated file.
    """
    if embedded_name(config.source) is not None:
        return None
    folder = _folder(config)
    checkpoint.check(folder, FAMILIES.get(config.family).model_types)
    return folder


def _modalities(config: ModelConfig, family: Any) -> tuple[Modality, ...]:
    asked = {Modality[name.upper()] for name in config.modalities}
    lacking = sorted(modality.name.lower() for modality in asked - set(family.modalities))
    if lacking:
        raise ModelError(
            "a model can only be asked for modalities of its family",
            value=f"{', '.join(lacking)} of {config.family}, which takes "
            + ", ".join(modality.name.lower() for modality in family.modalities),
            remedy="choose a model of another family, or fewer modalities",
        )
    return tuple(modality for modality in family.modalities if modality in asked)


def _device(name: str) -> torch.device:
    """The device, proved to work: an unavailable one should not be found out after the weights are read."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            "the device must exist on this machine",
            value=f"{name}: {str(error).splitlines()[0]}",
            remedy="set model.device=cpu",
        ) from error
    return device


def _from_zoo(config: ModelConfig, family: Any) -> tuple[Any, Any]:
    build: Callable[[ModelConfig], tuple[Any, Any]] = ZOO.get(embedded_name(config.source) or config.source)
    model, processor = build(config)
    if model.config.model_type not in family.model_types:
        raise ModelError(
            "the embedded model must be of the configured family",
            value=f"{config.source} is a {model.config.model_type}, the family is {config.family}",
            remedy="set model.family to match",
        )
    return model, processor


def load_smol_omni(config: ModelConfig) -> tuple[Any, Any]:
    """The embedded tri-modal model around SmolLM2-135M, and its processor."""
    from masq.models.zoo import smol_omni

    return _trained(smol_omni, config)


def load_smol_vl(config: ModelConfig) -> tuple[Any, Any]:
    """``smol_omni`` without audio, as a Qwen2.5-VL model, and its processor."""
    from masq.models.zoo import smol_vl

    return _trained(smol_vl, config)


def _trained(module: Any, config: ModelConfig) -> tuple[Any, Any]:
    model = module.build_model(getattr(torch, config.dtype), config.device)
    model.set_attn_implementation(config.attention)
    return model, module.build_processor()


def _from_checkpoint(
    folder: Path, config: ModelConfig, family: Any, *, streamed: bool
) -> tuple[Any, Any, CheckpointWeights | None]:
    """Model and processor of a checked folder, the processor first; streamed weights are left where they are."""
    model_class, processor_class = family.classes()
    shared: dict[str, Any] = {"local_files_only": True, "trust_remote_code": config.trust_remote_code}
    try:
        processor = processor_class.from_pretrained(folder, **shared)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            "a checkpoint folder must contain its processor's and tokenizer's files",
            value=f"{folder}: {_first_line(error)}",
            remedy="download preprocessor_config.json, tokenizer.json, tokenizer_config.json and the chat template",
        ) from error
    logger.info("reading %s", folder)
    if streamed:
        model = skeleton(
            model_class, folder, dtype=getattr(torch, config.dtype), attention=config.attention, shared=shared
        )
        source = CheckpointWeights(model, folder)
        _check_keys(source.loading_info(model), folder)
        return model, processor, source
    return _read_weights(model_class, folder, config, shared), processor, None


def _read_weights(model_class: Any, folder: Path, config: ModelConfig, shared: dict[str, Any]) -> Any:
    """The model, every one of its parameters read from ``folder``."""
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,
            output_loading_info=True,
            **shared,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(
            "transformers must be able to read the checkpoint",
            value=f"{folder}: {_first_line(error)}",
            remedy="compare config.json with the weights, or download both again",
        ) from error
    _check_keys(info, folder)
    _align(model)
    return model


def _align(model: Any) -> None:
    """Copy parameters that lie at odd places of a mapped file: kernels of the CPU round differently on those."""
    for parameter in model.parameters():
        if parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _check_keys(info: dict[str, Any], folder: Path) -> None:
    """Refuse a load after which a parameter is still random, or a stored tensor went nowhere."""
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(checkpoint.SKIPPED_PREFIXES)]
    problems = {
        "missing": info["missing_keys"],
        "mismatched": info["mismatched_keys"],
        "unexpected": unexpected,
        "failed": info["error_msgs"],
    }
    found = [f"{len(keys)} {kind} (first: {_first(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise ModelError(
            "the weights must fit the model exactly",
            value=f"{folder}: {'; '.join(found)}",
            remedy="compare config.json with the weights, or download both again",
        )


def _first(keys: Any) -> object:
    return sorted(keys, key=str)[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _folder(config: ModelConfig) -> Path:
    """The local folder of ``config.source``, downloaded first if it is a hub id."""
    path = Path(config.source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(config.source):
        raise ModelError(
            f"model.source must be {PREFIX}NAME, an existing checkpoint folder, or a hub id OWNER/NAME",
            value=config.source,
            remedy=f"check the path; embedded models are {', '.join(ZOO.names())}",
        )
    from huggingface_hub import snapshot_download

    patterns = [*DOWNLOADED, *([DOWNLOADED_CODE] if config.trust_remote_code else [])]
    try:
        return Path(snapshot_download(config.source, revision=config.revision, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            "a hub id must be downloadable, or already in the local cache",
            value=f"{config.source}: {_first_line(error)}",
            remedy="check the name and the connection, or give a checkpoint folder",
        ) from error

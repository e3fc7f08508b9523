"""W8A8 and W4A16 models in the compressed-tensors format, which transformers and other engines run without masq.

Only what the format can say is exported: one integer weight per linear, and inputs that are quantized per token or not
at all. Smoothing must be folded; corrections by modality and rotations at run time are refused. Two things differ from
what masq computes, neither in the stored weight:

- Where inputs are quantized, compressed-tensors divides a token's range by 127.5 where masq divides by 127.
- Scales are used in the dtype of the model.

Formats (as compressed-tensors 0.20 reads them; ``compressed_tensors/compressors``)
    ``int-quantized`` (weights of 8 bits, symmetric, per channel; inputs of 8 bits per token): ``weight`` int8 [O, I],
    ``weight_scale`` [O, 1].
    ``pack-quantized`` (weights of 4 bits per channel or group, inputs in float): ``weight_packed`` int32
    [O, ceil(I / 8)], code + 8 of column 8j + k in bits 4k to 4k + 3; ``weight_scale`` [O, G]; ``weight_shape`` int64
    [O, I]; and of asymmetric formats ``weight_zero_point`` int32 [ceil(O / 8), G], packed the same way down the rows,
    codes and zero points both shifted by 8 to be signed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from masq.errors import ModelError
from masq.export.checkpoint import MAX_SHARD_BYTES, model_config, new_folder, save_processor
from masq.export.shards import write_portions
from masq.models.rotated import RotatedInput
from masq.modules.packed_linear import PackedLinear
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import QuantizedTensor
from masq.numerics.packing import PackedWeight, unpack
from masq.numerics.scheme import LinearFormat, TensorFormat

if TYPE_CHECKING:
    from collections.abc import Container, Mapping
    from pathlib import Path

    from masq.models.base import ModelAdapter

_PER_WORD = 8
"""Codes of four bits in an int32."""
_SUFFIXES = ("weight", "bias", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point")
_REMEDY = "export it with --format masq"


def save(
    adapter: ModelAdapter, folder: Path, made_by: Mapping[str, Any], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a quantized model and its processor as a compressed-tensors checkpoint: the whole folder, or nothing.

    Args:
        adapter: a quantized model, simulated or packed; it is not changed.
        folder: to be made; it may exist if it is empty.
        made_by: what is known of the run, plain JSON, kept as ``masq_made_by`` in ``config.json``.
        max_shard_bytes: a weight file is at most so large, unless one tensor is larger.

    Raises:
        ModelError: the format has no words for a part of the model; the message names it.
        OutputError: the folder holds files already, or cannot be written.
    """
    layers = _quantized(adapter.model)
    fmt = _common_format(layers)
    with new_folder(folder) as temporary:
        model = adapter.model
        dtype, tied = adapter.embeddings().weight.dtype, getattr(model, "all_tied_weights_keys", {})
        write_portions(
            (_state(name, part, dtype, tied) for name, part in adapter.residence.portions(model)),
            temporary,
            [*model.state_dict(), *(f"{name}.{suffix}" for name in layers for suffix in _SUFFIXES)],
            max_shard_bytes,
            lambda _listing: {},
        )
        config = model_config(adapter)
        config.quantization_config = quantization_config(fmt, _float_linears(adapter.model))
        config.masq_made_by = dict(made_by)
        config.save_pretrained(temporary)
        adapter.model.generation_config.save_pretrained(temporary)
        save_processor(adapter, temporary)


def quantization_config(fmt: LinearFormat, ignored: list[str]) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors for one format of all linears but the ``ignored`` ones.

    Raises:
        ModelError: the format is neither W8A8 nor W4A16.
    """
    reason = unsupported_format(fmt)
    if reason:
        raise ModelError("compressed-tensors export is for W8A8 and W4A16", value=reason, remedy=_REMEDY)
    weights = _arguments(fmt.weight, "group" if fmt.weight.group_size else "channel", dynamic=False)
    inputs = None if fmt.activation is None else _arguments(fmt.activation, "token", dynamic=True)
    kind = "pack-quantized" if inputs is None else "int-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {"group_0": {**group, "format": kind}},
    }


def unsupported_format(fmt: LinearFormat) -> str | None:
    """Why a format is neither W8A8 nor W4A16, None if it is one of them."""
    weight, activation = fmt.weight, fmt.activation
    if activation is None:
        return None if weight.bits == 4 else f"weights of {weight.bits} bits with inputs in float"
    if (weight.bits, activation.bits) != (8, 8):
        return f"weights of {weight.bits} bits with inputs of {activation.bits} bits"
    if not weight.symmetric or weight.group_size:
        return "8-bit weights that are asymmetric or in groups"
    return None


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes [O, I] in [0, 15] to int32 [O, ceil(I / 8)], the first of eight in the lowest bits."""
    missing = -codes.shape[1] % _PER_WORD
    eights = nn.functional.pad(codes, (0, missing)).to(torch.int64).unflatten(1, (-1, _PER_WORD))
    words = (eights << (4 * torch.arange(_PER_WORD, device=codes.device))).sum(dim=2)
    # The highest code reaches the sign bit of the word.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _state(name: str, part: nn.Module, dtype: torch.dtype, tied: Container[str]) -> dict[str, torch.Tensor]:
    """Tensors of the part ``name`` of a model as they are stored."""
    state = part.state_dict(prefix=f"{name}." if name else "")
    for inner, module in part.named_modules(prefix=name):
        if isinstance(module, QuantLinear | PackedLinear):
            layer = PackedLinear.from_simulated(module) if isinstance(module, QuantLinear) else module
            state = {key: value for key, value in state.items() if not key.startswith(f"{inner}.")}
            state |= {f"{inner}.{key}": value for key, value in _tensors(layer, dtype).items()}
    return {key: value for key, value in state.items() if key not in tied}


def _quantized(model: nn.Module) -> dict[str, QuantLinear | PackedLinear]:
    """Quantized linears by name, once the format can say all that they do."""
    found: dict[str, QuantLinear | PackedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, RotatedInput):
            raise _unsaid("an input rotated at run time", name, "use method.rotation.down=false")
        if isinstance(module, QuantLinear | PackedLinear):
            _check_sayable(name, module)
            found[name] = module
    if not found:
        raise ModelError("an export is of a quantized model", value="every linear is in float")
    return found


def _check_sayable(name: str, module: QuantLinear | PackedLinear) -> None:
    if isinstance(module, QuantLinear) and len(module.weight_modalities) > 1:
        raise _unsaid("a weight per modality", name, "use a method with rounding.per_modality=false")
    if module.inverse_smoothing is not None:
        raise _unsaid("smoothing at run time", name, f"fold it (method.smoothing.fold=true), or {_REMEDY}")
    if module.centre is not None:
        raise _unsaid("centre of a modality", name, f"use method.centring=none, or {_REMEDY}")
    if module.correction_modalities:
        raise _unsaid("a low-rank correction", name, _REMEDY)


def _unsaid(what: str, name: str, remedy: str) -> ModelError:
    return ModelError(f"compressed-tensors has no {what}", value=name, remedy=remedy)


def _common_format(layers: Mapping[str, QuantLinear | PackedLinear]) -> LinearFormat:
    formats = {LinearFormat(layer.weight_format, layer.activation) for layer in layers.values()}
    if len(formats) > 1:
        raise ModelError(
            "compressed-tensors export is for one format of all quantized linears",
            value=f"{len(formats)} formats",
            remedy=_REMEDY,
        )
    return formats.pop()


def _float_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _arguments(fmt: TensorFormat, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": strategy,
        "group_size": fmt.group_size,
        "dynamic": dynamic,
    }


def _tensors(layer: PackedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of one linear by compressed-tensors' names."""
    state = layer.state_dict()
    stored = PackedWeight(
        state["codes"], state["scale"], state.get("zero_point"), layer.weight_format, layer.in_features
    )
    weight = unpack(stored)
    found = {"weight_scale": weight.scale.to(dtype)}
    if layer.bias is not None:
        found["bias"] = layer.bias
    if layer.activation is not None:
        return {**found, "weight": weight.codes}
    return {**found, **_packed(weight)}


def _packed(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    offset = 8 if weight.format.symmetric else 0
    found = {
        "weight_packed": pack_words(weight.codes.to(torch.int64) + offset),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        found["weight_zero_point"] = pack_words(weight.zero_point.t().to(torch.int64)).t().contiguous()
    return found

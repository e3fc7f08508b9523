"""From a model in memory to what a packed checkpoint holds: description, tensors, checksums."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import ModelError
from masq.export.description import FACTOR_DTYPES, SIDES, STORED_DTYPES, Description, LinearEntry
from masq.models.rotated import RotatedInput
from masq.modules.modality import Unlabelled
from masq.modules.packed_linear import PackedLinear
from masq.modules.quant_linear import QuantLinear
from masq.numerics.scheme import LinearFormat

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from torch import nn

    from masq.models.base import Modality

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def describe(
    model: nn.Module,
    *,
    groups: Mapping[nn.Module, int],
    placeholders: Mapping[int, Modality],
    residual_rotation: bool,
    made_by: Mapping[str, Any],
) -> Description:
    """Describe a quantized model, without checksums.

    Args:
        model: with simulated or packed linears.
        groups: number of the group of linears that share their input, by module.
        placeholders: modality by token id.
        residual_rotation: whether the residual stream is rotated.
        made_by: what is known of the run.

    Raises:
        ModelError: nothing is quantized, or a linear has one weight per modality.
    """
    linears = {
        name: _entry(module, groups[module])
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear | PackedLinear)
    }
    if not linears:
        raise ModelError(
            "a packed checkpoint is of a quantized model",
            value="every linear is in float",
            remedy="export the run of a method that quantizes",
        )
    sides = {name: [i for i, m in placeholders.items() if m.name.lower() == name] for name in SIDES}
    return Description(
        linears=linears,
        rotated=tuple(name for name, module in model.named_modules() if isinstance(module, RotatedInput)),
        residual_rotation=residual_rotation,
        placeholders={name: tuple(sorted(ids)) for name, ids in sides.items() if ids},
        made_by=made_by,
    )


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by name: quantized linears packed, tied weights once, signs of rotations.

    Raises:
        ModelError: a linear has one weight per modality.
    """
    return portion_state("", model, getattr(model, "all_tied_weights_keys", {}))


def portion_state(name: str, module: nn.Module, tied: Container[str]) -> dict[str, torch.Tensor]:
    """``plain_state`` of the part ``name`` of a model.

    Args:
        name: of the part, empty for the model itself.
        module: the part.
        tied: names of tensors that are stored elsewhere.

    Raises:
        ModelError: a linear has one weight per modality.
    """
    start = f"{name}." if name else ""
    state = module.state_dict(prefix=start)
    for inner, one in module.named_modules(prefix=name):
        if isinstance(one, QuantLinear):
            state = {key: value for key, value in state.items() if not key.startswith(f"{inner}.")}
            state |= {f"{inner}.{key}": value for key, value in PackedLinear.from_simulated(one).state_dict().items()}
        elif isinstance(one, RotatedInput):
            state[f"{inner}.signs"] = one.signs.float()
    return {key: value for key, value in state.items() if key not in tied}


def stored_names(model: nn.Module, description: Description) -> list[str]:
    """Names of all tensors of the checkpoint, and maybe some of quantized linears that are stored otherwise."""
    return [*model.state_dict(), *description.tensors()]


def listing(state: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    """[dtype, shape, SHA-256 of the bytes] of every tensor, by name."""
    return {
        name: [DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor_digest(tensor)] for name, tensor in state.items()
    }


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes as safetensors stores them: row by row, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _entry(module: QuantLinear | PackedLinear, group: int) -> LinearEntry:
    if isinstance(module, QuantLinear) and len(module.weight_modalities) > 1:
        raise ModelError(
            "a checkpoint has one stored weight for all modalities",
            value=f"{len(module.weight_modalities)} weights",
            remedy="export a method without rounding.per_modality (masquant stores one weight and corrects the others)",
        )
    state = module.state_dict()
    ranks = {side: state[f"left_{side}"].shape[1] for side in SIDES if f"left_{side}" in state}
    ends = [state[f"{end}_{side}"].dtype for side in ranks for end in ("left", "right")]
    factor_dtypes = {_name(dtype, FACTOR_DTYPES) for dtype in ends}
    bias, smoothing = state.get("bias"), state.get("inverse_smoothing")
    return LinearEntry(
        in_features=module.in_features,
        out_features=module.out_features,
        format=LinearFormat(module.weight_format, module.activation),
        bias=None if bias is None else _name(bias.dtype, STORED_DTYPES),
        smoothing=0 if smoothing is None else len(smoothing),
        ranks=ranks,
        factor_dtype=next(iter(factor_dtypes), None),
        group=group,
        centres=0 if module.centre is None else len(module.centre),
        tower=isinstance(module.context, Unlabelled),
    )


def _name(dtype: torch.dtype, known: Mapping[str, str]) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ModelError(
            f"biases and factors are stored in one of {', '.join(known)}",
            value=name,
            remedy="cast the model first",
        )
    return name

"""From a float skeleton to a packed model: empty layers for a loader to fill, then what makes it run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from masq.errors import ModelError
from masq.models.loading import FAMILIES
from masq.models.rotated import RotatedInput
from masq.models.sample import Modality
from masq.models.tokens import TokenModalities
from masq.modules.modality import ModalityContext, Unlabelled, install
from masq.modules.packed_linear import PackedLinear
from masq.modules.stack import stack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from masq.export.description import Description, LinearEntry
    from masq.models.base import BlockAdapter

_ALIGNMENT = 64


@dataclass
class _Called:
    """A model and the modality of its calls' tokens: all that the modality hook needs of an adapter."""

    model: Any
    family: Any
    tokens: TokenModalities

    def modality_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        self.family.check_call(inputs)
        return self.tokens.of(inputs)


def assemble(model: Any, description: Description) -> None:
    """Put run-time rotations and empty packed linears into a model on the meta device, and install the modality hook.

    Args:
        model: as its class builds it from the configuration, changed in place.
        description: of its checkpoint.

    Raises:
        ModelError: an unknown family, or a linear that the model has not, or not so.
    """
    tokens = TokenModalities({i: Modality[side.upper()] for side, ids in description.placeholders.items() for i in ids})
    context, _ = install(_Called(model, family_of(model.config.model_type), tokens))
    with torch.device("meta"):
        for name in description.rotated:
            linear = _linear(model, name)
            rotated = RotatedInput(linear, torch.empty(linear.in_features, dtype=torch.float32))
            rotated.register_buffer("signs", rotated.signs, persistent=True)
            model.set_submodule(name, rotated)
        for name, entry in description.linears.items():
            linear = _linear(model, name)
            _check_fits(name, linear, entry)
            model.set_submodule(name, _empty(entry, Unlabelled() if entry.tower else context))


def check_complete(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint fills a model exactly: transformers would make up what is missing.

    Args:
        model: assembled, on the meta device.
        shapes: of the stored tensors, by name.

    Raises:
        ModelError: a tensor is missing, unknown, or of another shape.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        raise ModelError(
            "the stored tensors must be those of the model",
            value=f"{wrong[0]}: {shapes.get(wrong[0], 'none')} stored, {wanted.get(wrong[0], 'none')} in the model",
            remedy="the checkpoint is damaged: copy it again, or export the run again",
        )


def finish(model: Any, description: Description) -> None:
    """Make a filled model ready to run: tensors aligned, linears that read the same input stacked."""
    _align(model)
    groups: dict[int, list[PackedLinear]] = {}
    # In the order of the model, as when it was packed in memory: that of a JSON file means nothing.
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            groups.setdefault(description.linears[name].group, []).append(module)
    for layers in groups.values():
        stack(layers)
    model.requires_grad_(False)


def family_of(model_type: str) -> Any:
    """The adapter class of a model type.

    Raises:
        ModelError: no family has it.
    """
    families = [FAMILIES.get(name) for name in FAMILIES.names()]
    found = next((family for family in families if model_type in family.model_types), None)
    if found is None:
        raise ModelError(
            "a packed checkpoint is of a model family that masq knows",
            value=model_type,
            remedy=f"one of {', '.join(FAMILIES.names())}",
        )
    return found


def blocks_of(model: Any) -> list[BlockAdapter]:
    """Decoder blocks of a model without its processor, which they do not look at."""
    family = family_of(model.config.model_type)
    adapter = object.__new__(family)
    adapter.model = model
    return adapter.blocks()


def _linear(model: Any, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if type(module) is not nn.Linear:
        raise ModelError(
            "config.json must name linears of the model",
            value=f"{name} is {'not there' if module is None else type(module).__name__}",
            remedy="load it with the class that config.json names under architectures",
        )
    return module


def _check_fits(name: str, linear: nn.Linear, entry: LinearEntry) -> None:
    # Centres bring a bias to a linear that has none.
    has_bias = linear.bias is not None or bool(entry.centres)
    wanted = (entry.in_features, entry.out_features, entry.bias is not None)
    found = (linear.in_features, linear.out_features, has_bias)
    if wanted != found:
        raise ModelError(
            f"{name} must have the inputs, outputs and bias of the model",
            value=f"{wanted}, not {found}",
            remedy="the checkpoint is damaged: copy it again, or export the run again",
        )


def _empty(entry: LinearEntry, context: ModalityContext) -> PackedLinear:
    dtype = getattr(torch, entry.factor_dtype or "float32")
    return PackedLinear.empty(
        entry.in_features,
        entry.out_features,
        entry.format,
        context=context,
        bias=None if entry.bias is None else getattr(torch, entry.bias),
        num_rows=(entry.smoothing, entry.centres),
        ranks={Modality[side.upper()]: (rank, dtype) for side, rank in entry.ranks.items()},
    )


def _align(model: nn.Module) -> None:
    """Copy tensors that lie at odd places of a mapped file, codes apart.

    Floating-point kernels of the CPU round differently on unaligned data; integer codes are the same anywhere, and stay
    in the file until a kernel takes them over.
    """
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and name != "codes" and tensor.data_ptr() % _ALIGNMENT:
                    tensor.data = tensor.data.clone()

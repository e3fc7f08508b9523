"""How transformers loads and saves masq's packed checkpoints: a quantization config and a quantizer.

``from_pretrained`` builds the model on the meta device and hands it to ``MasqHfQuantizer``, which checks the folder and
puts empty packed linears in; it fills their tensors from the memory-mapped files, and hands the model back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from masq.errors import ModelError
from masq.export import checkpoint, files
from masq.export.assemble import assemble, check_complete, finish
from masq.export.describe import describe, listing, plain_state
from masq.export.description import METHOD, Description
from masq.models.sample import Modality
from masq.modules.packed_linear import PackedLinear

if TYPE_CHECKING:
    from torch import nn

_MAX_DEPTH = 4096


class MasqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint.

    Args:
        description: what the checkpoint says of itself.
    """

    def __init__(self, description: Description) -> None:
        self.quant_method: Any = METHOD
        self.description = description

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Parse the JSON content strictly.

        Raises:
            ModelError: a wrong version, checksum, key, type or value.
        """
        config = cls(Description.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON content."""
        return self.description.to_dict()


class MasqHfQuantizer(HfQuantizer):
    """Loads and saves packed checkpoints; it does not quantize (``masq run`` does)."""

    requires_calibration = True
    quantization_config: MasqConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """The configuration unchanged, once it is of a size that can be built.

        Raises:
            ModelError: so many layers that a model without weights would not fit.
        """
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            for key in ("num_hidden_layers", "encoder_layers", "depth"):
                depth = getattr(part, key, 0)
                if not isinstance(depth, int) or not 0 <= depth <= _MAX_DEPTH:
                    raise ModelError(f"{key} must lie between 0 and {_MAX_DEPTH}", value=depth, remedy="copy it again")
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        paths = kwargs.get("checkpoint_files")
        if not paths:
            raise ModelError(
                "a packed checkpoint is read from its folder",
                value="no weight files",
                remedy="call from_pretrained(folder) without state_dict",
            )
        folder = Path(paths[0]).parent
        description = checkpoint.check_once(folder)
        if description != self.quantization_config.description:
            raise ModelError(
                "config and weights must be of one checkpoint",
                value="another quantization_config than that beside the weights",
                remedy="pass no config, or that of the folder",
            )
        assemble(model, description)
        check_complete(model, {name: tensor.shape for name, tensor in files.read_headers(folder)[0].items()})
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        finish(model, self.quantization_config.description)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Tensors in the plain layout, and their listing; the checksums of the configuration are brought up to date."""
        old = self.quantization_config.description
        packed = {name: one for name, one in model.named_modules() if isinstance(one, PackedLinear)}
        groups: dict[nn.Module, int] = {module: old.linears[name].group for name, module in packed.items()}
        state = plain_state(model)
        found = listing(state)
        description = describe(
            model,
            groups=groups,
            placeholders={i: Modality[side.upper()] for side, ids in old.placeholders.items() for i in ids},
            residual_rotation=old.residual_rotation,
            made_by=old.made_by,
        )
        rest = files.config_digest(checkpoint.json_of(model.config))
        self.quantization_config.description = description.sealed(files.tensors_digest(found), rest)
        model.config.quantization_config = self.quantization_config
        return state, {files.LISTING: files.listing_text(found)}

    def is_serializable(self) -> Any:
        """Whether ``save_pretrained`` works: it does."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Whether the weights can be trained: integers cannot."""
        return False


register_quantization_config(METHOD)(MasqConfig)
register_quantizer(METHOD)(MasqHfQuantizer)

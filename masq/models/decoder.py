"""What the Qwen2-style decoders share: Llama block layout and a language model under ``model.model.language_model``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import Module

from masq.errors import ModelError
from masq.models.base import GROUPS, BlockAdapter, ModelAdapter, Role
from masq.models.refused import LINEARS
from masq.models.rotated import RotatedInput

if TYPE_CHECKING:
    from torch import nn

_PLACES: dict[Role, tuple[str, str]] = {
    Role.QUERY: ("self_attn", "q_proj"),
    Role.KEY: ("self_attn", "k_proj"),
    Role.VALUE: ("self_attn", "v_proj"),
    Role.OUTPUT: ("self_attn", "o_proj"),
    Role.GATE: ("mlp", "gate_proj"),
    Role.UP: ("mlp", "up_proj"),
    Role.DOWN: ("mlp", "down_proj"),
}
_NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}


class LlamaBlock(BlockAdapter):
    """A decoder layer with Llama's module names.

    Args:
        layer: the decoder layer.
        config: the language model's configuration.
    """

    def __init__(self, layer: Any, config: Any) -> None:
        self._layer = layer
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(layer.self_attn.head_dim)

    @property
    def module(self) -> nn.Module:
        """The decoder layer."""
        return self._layer

    def linear(self, role: Role) -> nn.Module:
        """See ``BlockAdapter.linear``."""
        parent, name = _PLACES[Role(role)]
        module = getattr(getattr(self._layer, parent), name)
        return module.linear if isinstance(module, RotatedInput) else module

    def set_linear(self, role: Role, module: nn.Module) -> None:
        """See ``BlockAdapter.set_linear``."""
        parent, name = _PLACES[Role(role)]
        owner = getattr(self._layer, parent)
        present = getattr(owner, name)
        if isinstance(present, RotatedInput) and not isinstance(module, RotatedInput):
            present.linear = module
        else:
            setattr(owner, name, module)

    def norm(self, group: str) -> nn.Module | None:
        """See ``BlockAdapter.norm``."""
        if group not in GROUPS:
            raise ModelError("the group of linears must be known", value=group, remedy=f"one of {', '.join(GROUPS)}")
        return getattr(self._layer, _NORMS[group]) if group in _NORMS else None

    def gated(self) -> tuple[nn.Module, nn.Module] | None:
        """See ``BlockAdapter.gated``."""
        return self._layer.mlp, self._layer.mlp.act_fn


class DecoderAdapter(ModelAdapter):
    """A conditional-generation model with towers beside ``model.language_model`` and a head ``lm_head``."""

    @property
    def _language_model(self) -> Any:
        return self.model.model.language_model

    def blocks(self) -> list[BlockAdapter]:
        """See ``ModelAdapter.blocks``."""
        language_model = self._language_model
        return [LlamaBlock(layer, language_model.config) for layer in language_model.layers]

    def embeddings(self) -> nn.Embedding:
        """See ``ModelAdapter.embeddings``."""
        return self._language_model.embed_tokens

    def head(self) -> nn.Linear:
        """See ``ModelAdapter.head``."""
        return self.model.lm_head

    def final_norm(self) -> nn.Module:
        """See ``ModelAdapter.final_norm``."""
        return self._language_model.norm

    def block_attention_kinds(self) -> tuple[str, ...]:
        """See ``ModelAdapter.block_attention_kinds``; a language model that names none has one mask for all."""
        layers = self._language_model.layers
        return tuple(getattr(self._language_model.config, "layer_types", None) or ["full_attention"] * len(layers))

    def check_blocks(self) -> None:
        """See ``ModelAdapter.check_blocks``; also, that every block is of this layout.

        Raises:
            ModelError: the blocks take different attention masks, or one has a role that is no linear.
        """
        super().check_blocks()
        for index, layer in enumerate(self._language_model.layers):
            for role, (parent, name) in _PLACES.items():
                found = getattr(getattr(layer, parent, None), name, None)
                if not isinstance(found, Module):
                    raise ModelError(
                        LINEARS,
                        value=f"block {index}, a {type(layer).__name__}, has no linear {parent}.{name} for {role}",
                        remedy="use a dense model: stacked experts and linear attention are not taken",
                    )

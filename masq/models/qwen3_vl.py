"""Qwen3-VL (arXiv 2511.21631): text and vision, visual features of several depths (DeepStack, arXiv 2406.04334)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from masq.models.base import Modality
from masq.models.decoder import DecoderAdapter, LlamaBlock

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from masq.models.base import BlockAdapter

_HANDED_DOWN = "masq_deepstack"


class Qwen3VLBlock(LlamaBlock):
    """A decoder layer, and the visual features that the language model adds to what comes out of it.

    Args:
        layer: the decoder layer.
        config: the language model's configuration.
        index: number of the layer.
    """

    def __init__(self, layer: Any, config: Any, index: int) -> None:
        super().__init__(layer, config)
        self._index = index

    def forward(self, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """See ``BlockAdapter.forward``: the input [B, T, d] of the next block, DeepStack included."""
        rest = dict(kwargs)
        mask, *features = rest.pop(_HANDED_DOWN, (None,))
        output = super().forward(hidden, rest)
        if self._index >= len(features):
            return output
        # In the order and the dtypes of transformers, so that a replay is the model's own arithmetic.
        added = output[mask] + features[self._index].to(output.device, output.dtype)
        output = output.clone()
        output[mask] = added
        return output


class Qwen3VLAdapter(DecoderAdapter):
    """``Qwen3VLForConditionalGeneration`` and ``Qwen3VLProcessor``."""

    modalities = (Modality.TEXT, Modality.VISION)
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)

    def __init__(self, model: Any, processor: Any, **budget: Any) -> None:
        super().__init__(model, processor, **budget)
        self._language_model.register_forward_pre_hook(_hand_down, with_kwargs=True)

    @staticmethod
    def classes() -> tuple[Any, Any]:
        """The transformers classes of the model and of its processor."""
        from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

        return Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    def blocks(self) -> list[BlockAdapter]:
        """See ``ModelAdapter.blocks``."""
        language_model = self._language_model
        return [Qwen3VLBlock(layer, language_model.config, i) for i, layer in enumerate(language_model.layers)]

    def projectors(self) -> list[nn.Linear]:
        """The last linears of the vision tower's patch merger and of the mergers whose outputs later blocks receive."""
        visual = self.model.model.visual
        return [merger.linear_fc2 for merger in (visual.merger, *visual.deepstack_merger_list)]

    def placeholders(self) -> dict[int, Modality]:
        """Image and video pads. The times between the frames of a video are text."""
        config = self.model.config
        return {config.image_token_id: Modality.VISION, config.video_token_id: Modality.VISION}


def _hand_down(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Show the decoder layers which features will be added after them.

    The language model adds them between its layers, where no hook on a layer sees them; but it passes on to every layer
    what it does not know, and so a captured call holds them for replay. Attention ignores them.
    """
    features = kwargs.get("deepstack_visual_embeds")
    if features is None:
        return None
    return args, {**kwargs, _HANDED_DOWN: (kwargs["visual_pos_masks"], *features)}
